// How the risk adds up: baseline, kinds, remainder; the largest contributions; all of them, opened on demand.

const MOST_ROWS = 100;
const QUESTION = "the question itself";
const rowsOf = (answer) => answer.rows.map((item, place) => ({ item, value: answer.contribution[place] || 0 }));
const total = (rows) => rows.reduce((sum, row) => sum + row.value, 0);
const bySize = (one, other) => Math.abs(other.value) - Math.abs(one.value);

const largestOf = new Map();
function largest(answer, most) {
  if (!largestOf.has(answer)) {
    largestOf.set(
      answer,
      rowsOf(answer)
        .filter(({ item, value }) => value !== 0 && (items.event[item] >= 0 || items.group[item] >= 0))
        .sort(bySize)
        .slice(0, 100),
    );
  }
  return largestOf.get(answer).slice(0, most);
}

function sums(rows, key) {
  const groups = new Map();
  for (const row of rows) {
    const name = key(row.item);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(row);
  }
  return groups;
}

// -- the waterfall --

// The rounder a risk, the sooner it gets its line.
const RISKS = [
  [0.5],
  [0.1, 0.01, 0.9, 0.001, 0.99, 0.0001, 0.999, 0.9999],
  [0.2, 0.05, 0.8, 0.95, 0.02, 0.005, 0.98, 0.0005],
  [0.3, 0.4, 0.6, 0.7, 0.03, 0.15, 0.07, 0.002, 0.04, 0.06, 0.08],
].flat();

function drawWaterfall(answer) {
  const rows = rowsOf(answer);
  const named = rows.length && rows.every(({ item }) => items.group[item] >= 0);
  let steps = [...sums(rows, named ? nameOf : (item) => kindName(kindOf(item)))]
    .map(([name, members]) => ({ name, value: total(members), events: members.length }))
    .sort(bySize);
  if (steps.length > 12) {
    const others = steps.slice(11);
    steps = [...steps.slice(0, 11), { name: `${others.length} others`, value: total(others), events: 0 }];
  }
  if (answer.remainder !== null && Math.abs(answer.remainder) >= 0.005) {
    steps.push({ name: "remainder", value: answer.remainder, events: 0 });
  }
  const holder = byId("waterfall"),
    wide = width(holder),
    row = 24;
  const left = wide < 560 ? 118 : 210,
    right = wide < 560 ? 52 : 70;
  let now = answer.baseline,
    low = Math.min(now, answer.logOdds),
    top = Math.max(now, answer.logOdds);
  for (const step of steps) {
    step.from = now;
    now += step.value;
    low = Math.min(low, now);
    top = Math.max(top, now);
  }
  const margin = Math.max(0.15, 0.06 * (top - low));
  low -= margin;
  top += margin;
  const x = (value) => left + ((value - low) / (top - low)) * (wide - left - right);
  const high = (steps.length + 2) * row + 34,
    bottom = (steps.length + 2) * row + 4;
  const picture = canvasOf(
    holder,
    wide,
    high,
    `From ${percent(risk(answer.baseline))} to ${percent(answer.score)}: ` +
      steps.map((step) => `${step.name} ${signed(step.value)}`).join(", "),
  );
  const taken = [],
    logit = (share) => Math.log(share / (1 - share));
  const free = (place) =>
    place >= left && place <= wide - right && taken.every((other) => Math.abs(place - other) >= 46);
  // Where no round risk lies, those that lie there.
  const there = [0.1, 0.5, 0.9].map((part) => risk(low + part * (top - low)));
  const round = RISKS.filter((share) => x(logit(share)) >= left && x(logit(share)) <= wide - right);
  for (const share of round.length > 1 ? round : there) {
    const place = x(logit(share));
    if (!free(place)) continue;
    taken.push(place);
    picture.append(
      draw("line", { x1: place, x2: place, y1: 0, y2: bottom, class: "grid" }),
      label(place, bottom + 16, round.length > 1 ? `${Number((share * 100).toPrecision(3))} %` : percent(share), {
        "text-anchor": "middle",
        class: "soft",
      }),
    );
  }
  picture.append(label(left - 10, bottom + 16, "risk", { "text-anchor": "end", class: "soft" }));
  const short = (name) =>
    wide < 560 && name.length > 17 ? `${name.slice(0, 16)}…` : name.length > 28 ? `${name.slice(0, 27)}…` : name;
  const whole = (y, name, value, share) =>
    picture.append(
      label(left - 10, y + 16, name, { "text-anchor": "end", "font-weight": 600 }),
      draw("line", { x1: x(value), x2: x(value), y1: y + 2, y2: y + row - 2, class: "whole" }),
      label(x(value) + 6, y + 16, percent(share), { "font-weight": 600, class: "halo" }),
    );
  whole(0, "baseline", answer.baseline, risk(answer.baseline));
  steps.forEach((step, place) => {
    const y = (place + 1) * row,
      from = x(Math.min(step.from, step.from + step.value));
    const to = x(Math.max(step.from, step.from + step.value));
    picture.append(
      label(left - 10, y + 16, short(step.name), { "text-anchor": "end" }),
      draw(
        "rect",
        {
          x: from,
          y: y + 5,
          width: Math.max(1, to - from),
          height: row - 10,
          class: step.name === "remainder" ? "rest" : step.value < 0 ? "lowers" : "raises",
        },
        title(
          `${step.name}: ${signed(step.value)}, odds ${factor(step.value)}` +
            (step.events ? `, ${grouped(step.events)} rows` : ""),
        ),
      ),
      label(wide - right + 8, y + 16, signed(step.value), {}),
    );
  });
  whole((steps.length + 1) * row, "answer", answer.logOdds, answer.score);
  byId("sum-note").textContent =
    `Baseline: ${answer.baselineName || "not named"} (log-odds ${signed(answer.baseline)}). Numbers at the right are ` +
    `log-odds; the scale below tells the risk that they stand for. Solid bars raise the risk, hatched bars lower it.` +
    (answer.remainder !== null ? ` Remainder, which the method gives to nothing: ${signed(answer.remainder)}.` : "");
}

// -- the largest --

// Parts of a line that are not broken themselves.
const pieces = (...parts) => parts.filter(Boolean).flatMap((part) => [make("span", { class: "number" }, part), " "]);

function drawLargest(answer) {
  const rows = largest(answer, 15);
  const most = rows.length ? Math.abs(rows[0].value) : 0;
  const grouping = rows.length && items.group[rows[0].item] >= 0;
  const head = grouping ? ["group", "", "log-odds", "odds"] : ["event", "value", "time", "", "log-odds", "odds"];
  const body = rows.map(({ item, value }) =>
    make(
      "tr",
      {},
      make(
        "td",
        { class: "name" },
        ...eventName(item),
        ...(grouping ? [] : [make("span", { class: "narrow" }, ...pieces(valueOf(item), moment(items.time[item])))]),
      ),
      ...(grouping
        ? []
        : [make("td", { class: "roomy" }, valueOf(item)), make("td", { class: "roomy" }, moment(items.time[item]))]),
      make("td", { class: "bars" }, bar(value, most)),
      make("td", {}, signed(value)),
      make("td", {}, factor(value)),
    ),
  );
  byId("top").replaceChildren(
    rows.length
      ? make(
          "table",
          {},
          make(
            "thead",
            {},
            make(
              "tr",
              {},
              ...head.map((name) =>
                make("th", { scope: "col", class: ["value", "time"].includes(name) && "roomy" }, name),
              ),
            ),
          ),
          make("tbody", {}, ...body),
        )
      : make("p", {}, "No event has a contribution."),
  );
}

function eventName(item) {
  const name = nameOf(item),
    code = text(items.code[item]);
  return code && code !== name ? [name, " ", make("span", { class: "code" }, code)] : [name];
}

// -- all of them --

// Visits where the record has them; else the day, or six hours of a short stay.
function sectionsOf(answer) {
  const rows = rowsOf(answer);
  if (rows.length && rows.every(({ item }) => items.group[item] >= 0)) return rows.map((row) => leaf(row));
  const timed = rows
    .filter(({ item }) => items.time[item] !== null && items.event[item] >= 0)
    .map(({ item }) => items.time[item]);
  let first = Infinity,
    last = -Infinity;
  for (const time of timed) {
    if (time < first) first = time;
    if (time > last) last = time;
  }
  const visits = rows.some(({ item }) => items.visit[item] > 0);
  const step = last - first <= 4 * DAY ? DAY / 4 : DAY,
    byMonth = last - first > 400 * DAY;
  const key = (item) => {
    const kind = kindOf(item),
      time = items.time[item];
    if (kind === "question") return QUESTION;
    if (kind === "time") return kindName(kind);
    if (items.visit[item] > 0) return items.visit[item];
    if (items.event[item] >= 0 && time === null) return "facts without a time";
    if (visits) return items.event[item] >= 0 ? "outside visits" : "marks of visits and intervals";
    if (time === null) return "marks of visits and intervals";
    return byMonth
      ? day(time).slice(0, 7)
      : step < DAY
        ? `${day(time)} ${clock(Math.floor(time / step) * step)}`
        : day(time);
  };
  return [...sums(rows, key)].map(([name, members]) => {
    let start = null,
      end = null;
    for (const { item } of members) {
      const time = items.time[item];
      if (time === null) continue;
      if (start === null || time < start) start = time;
      if (end === null || time > end) end = time;
    }
    const isVisit = typeof name === "number";
    const heading = isVisit
      ? `Visit ${name}`
      : !visits && start !== null && step < DAY && !byMonth && /^\d/.test(name)
        ? `from ${name}`
        : name;
    return {
      name: heading,
      about:
        isVisit || name === "outside visits" ? [visitClass(members, start, end), span(start, end)].filter(Boolean) : [],
      value: total(members),
      members,
      start,
      end,
      isVisit,
    };
  });
}
const leaf = (row) => ({
  name: nameOf(row.item),
  about: moment(items.time[row.item]),
  value: row.value,
  members: null,
  start: items.time[row.item],
});

// What the visit's starts say; where its start was not seen, what the record says of that time.
function visitClass(members, start, end) {
  const classes = members
    .filter(({ item }) => kindOf(item) === "visit_start")
    .map(({ item }) => classOf(text(items.code[item])));
  if (!classes.length && data.record && start !== null) {
    const meant = data.record.visits.filter(([from, to]) => from <= end && to >= start).map(([, , name]) => name);
    classes.push(...meant.filter((name) => name !== "other visit"));
  }
  return [...new Set(classes)].join(" and ");
}

function sorted(list, order) {
  const early = (each) =>
    [QUESTION, kindName("time")].includes(each.name) ? Infinity : each.start === null ? -Infinity : each.start;
  return [...list].sort(order === "size" ? bySize : (one, other) => early(one) - early(other));
}

// A line with a button that opens what is below it; that is built when it is opened.
function disclosure(level, name, about, number, value, most, open) {
  const below = make("div", { class: "below", hidden: "" });
  let built = false;
  const button = make(
    "button",
    { type: "button", class: "line", "aria-expanded": "false" },
    make(
      "span",
      { class: "name" },
      make("b", {}, name),
      ...about.flatMap((each) => [" ", make("span", { class: "about" }, each)]),
      make("span", { class: "number" }, ` · ${number}`),
    ),
    bar(value, most),
    make("span", { class: "value" }, signed(value)),
  );
  button.addEventListener("click", () => toggle());
  const toggle = (wanted) => {
    const opens = wanted === undefined ? button.getAttribute("aria-expanded") !== "true" : wanted;
    if (opens && !built) {
      below.append(...open());
      built = true;
    }
    button.setAttribute("aria-expanded", String(opens));
    below.hidden = !opens;
  };
  const element = make("div", { class: `group level${level}` }, button, below);
  return { element, toggle, button };
}

function eventRows(members, order, most) {
  const lines = sorted(
    members.map((row) => ({ ...row, start: items.time[row.item] })),
    order,
  );
  const holder = make("div", {});
  let shown = 0;
  const more = make("button", { type: "button", class: "more" });
  const extend = () => {
    const next = lines
      .slice(shown, shown + MOST_ROWS)
      .map(({ item, value }) =>
        make(
          "div",
          { class: "line event" },
          make(
            "span",
            { class: "name" },
            ...eventName(item),
            valueOf(item) ? make("span", { class: "measured" }, ` ${valueOf(item)}`) : "",
            make("span", { class: "number" }, items.time[item] === null ? "" : ` · ${moment(items.time[item])}`),
          ),
          bar(value, most),
          make("span", { class: "value" }, signed(value)),
        ),
      );
    holder.append(...next);
    shown += next.length;
    const left = lines.length - shown;
    more.hidden = left <= 0;
    more.textContent = `Show ${Math.min(left, MOST_ROWS)} more of ${grouped(left)}`;
  };
  more.addEventListener("click", extend);
  extend();
  return [holder, more];
}

let sections = [];
function drawGroups(answer, order) {
  const groups = sorted(sectionsOf(answer), order);
  let most = 0;
  for (const group of groups) most = Math.max(most, Math.abs(group.value));
  sections = groups.filter((group) => group.members);
  const shown = groups.map((group) => {
    if (!group.members) {
      return make(
        "div",
        { class: "line event" },
        make(
          "span",
          { class: "name" },
          make("b", {}, group.name),
          group.start === null ? "" : make("span", { class: "number" }, ` · ${group.about}`),
        ),
        bar(group.value, most),
        make("span", { class: "value" }, signed(group.value)),
      );
    }
    const kinds = [...sums(group.members, kindOf)].map(([kind, members]) => ({
      kind,
      members,
      value: total(members),
      start: members.reduce(
        (least, { item }) => Math.min(least, items.time[item] === null ? Infinity : items.time[item]),
        Infinity,
      ),
    }));
    const biggest = Math.max(...kinds.map((kind) => Math.abs(kind.value)));
    const each = (members) => members.reduce((found, row) => Math.max(found, Math.abs(row.value)), 0);
    const open = () =>
      kinds.length === 1
        ? eventRows(group.members, order, each(group.members))
        : sorted(kinds, "size").map((kind) => {
            const inner = disclosure(2, kindName(kind.kind), [], countOf(kind.members), kind.value, biggest, () =>
              eventRows(kind.members, order, each(kind.members)),
            );
            // A few events need no click of their own.
            if (kind.members.length <= 3) inner.toggle(true);
            return inner.element;
          });
    group.line = disclosure(1, group.name, group.about, countOf(group.members), group.value, most, open);
    return group.line.element;
  });
  byId("groups").replaceChildren(...shown);
  byId("key").textContent =
    "Each line: what it is, its bar, and its contribution in log-odds. " +
    (sections.length
      ? "A line opens to kinds, a kind to events; "
      : "This method has groups of events, which do not open; ") +
    "bars are drawn against the largest of their own list.";
  byId("open-all").hidden = !sections.length;
}
function countOf(members) {
  const events = members.filter(({ item }) => items.event[item] >= 0).length;
  return events ? count(events, "event") : count(members.length, "mark");
}

function openAll() {
  for (const group of sections) group.line.toggle(true);
}
function openVisit(visit) {
  const near = sections.filter((group) => group.start !== null && group.start <= visit.end && group.end >= visit.start);
  // An open visit reaches over all that follow: the one that begins with it is meant.
  const visits = near.filter((group) => group.isVisit);
  const away = (group) => Math.abs(group.start - visit.start);
  const [chosen] = (visits.length ? visits : near).sort((one, other) => away(one) - away(other));
  if (!chosen) return;
  chosen.line.toggle(true);
  chosen.line.element.scrollIntoView({ block: "start" });
  chosen.line.button.focus();
}
