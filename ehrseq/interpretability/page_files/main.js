// What is chosen, and everything that follows from it.

const tasks = [...new Set(data.answers.map((answer) => answer.task))];
const chosen = { task: tasks[0], method: data.answers[0].method, order: "time", spanPlace: 0 };
const answersTo = (task) => data.answers.filter((answer) => answer.task === task);
const current = () =>
  answersTo(chosen.task).find((answer) => answer.method === chosen.method) || answersTo(chosen.task)[0];

function show() {
  const answer = current();
  choices(
    byId("tasks"),
    tasks.map((task) => {
      const score = answersTo(task)[0].score;
      return `${words(task)} ${score === null ? "–" : percent(score)}`;
    }),
    tasks.indexOf(chosen.task),
    (place) => {
      chosen.task = tasks[place];
      show();
    },
  );
  const methods = answersTo(chosen.task).map((each) => each.method);
  choices(byId("methods"), methods.map(words), methods.indexOf(answer.method), (place) => {
    chosen.method = methods[place];
    show();
  });

  byId("answer-title").textContent =
    answer.score === null ? words(answer.task) : `Risk ${percent(answer.score)}: ${answer.label || words(answer.task)}`;
  byId("answer").textContent = answer.score === null ? "" : answerWords(answer);
  byId("definition").textContent = answer.definition;
  byId("method").textContent = `Explained by ${words(answer.method)}. ${answer.methodWords}`;
  const reason = words(answer.reason || "");
  byId("reason").textContent = !reason
    ? ""
    : answer.rows.length
      ? `To be read with care: the question is asked where the model did not learn it (${reason}).`
      : `There is no explanation: ${reason}.`;
  byId("settings").textContent = answer.settings.map(([name, value]) => `${words(name)}: ${value}`).join(" · ");

  const explained = answer.rows.length > 0;
  for (const part of ["sum", "largest", "all"]) byId(part).hidden = !explained;
  byId("method").hidden = !explained;
  showNotes(answer);
  layout();
  if (explained) {
    drawLargest(answer);
    showGroups();
  }
}

function answerWords(answer) {
  const start = `${words(answer.task)}: log-odds ${signed(answer.logOdds)}`;
  if (answer.baseline === null) return `${start}.`;
  const odds = factor(answer.logOdds - answer.baseline);
  return `${start}; from a baseline of ${percent(risk(answer.baseline))} the contributions make the odds ${odds}.`;
}

function showNotes(answer) {
  const notes = answer.notes.map(([name, number]) => `${name}: ${grouped(number)}`);
  byId("notes").replaceChildren(
    ...(notes.length ? notes : ["Nothing of the record up to the prediction time was left out."]).map((note) =>
      make("li", {}, note),
    ),
  );
}

function showGroups() {
  choices(byId("orders"), ["by time", "by size"], chosen.order === "time" ? 0 : 1, (place) => {
    chosen.order = place ? "size" : "time";
    showGroups();
  });
  drawGroups(current(), chosen.order);
}

// What depends on the width of the page.
function layout() {
  const answer = current(),
    spans = spansOf(answer);
  if (chosen.spanPlace >= spans.length) chosen.spanPlace = 0;
  choices(
    byId("spans"),
    spans.map(([name]) => name),
    chosen.spanPlace,
    (place) => {
      chosen.spanPlace = place;
      layout();
    },
  );
  byId("spans").parentElement.hidden = spans.length < 2;
  drawRecord(answer, spans.length ? spans[chosen.spanPlace][1] : 0, openVisit);
  if (answer.rows.length) drawWaterfall(answer);
}

byId("patient").textContent = data.patient ? `Patient ${data.patient}` : "Patient";
byId("when").textContent =
  data.time === null
    ? "The whole record; times are UTC, as in the record."
    : `At ${moment(data.time)}: nothing later was read. Times are those of the record.`;
byId("notice").textContent = data.notice;
byId("notice").hidden = !data.notice;
byId("open-all").addEventListener("click", openAll);
show();
performance.mark("ehrseq-shown");

const matrices = data.attention.filter((weights) => weights.matrix);
const profiles = [...data.fusion, ...data.attention].filter((weights) => !weights.matrix);
const again = [];
// After the first picture: the page can be read while they are decoded.
requestAnimationFrame(() =>
  setTimeout(() => {
    if (matrices.length) again.push(startMatrix(matrices));
    if (profiles.length) again.push(startWeights(profiles));
  }),
);

let waiting = null;
window.addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    layout();
    again.forEach((draws) => draws());
  }, 100);
});
for (const [event, printing] of [
  ["beforeprint", true],
  ["afterprint", false],
]) {
  window.addEventListener(event, () => {
    paper = printing;
    layout();
    again.forEach((draws) => draws());
  });
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => again.forEach((draws) => draws()));
