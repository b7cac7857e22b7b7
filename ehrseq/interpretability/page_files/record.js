// The record as a timeline by kind, the largest contributions on it, and under it the risk as it went.

const LINES = ["diagnosis", "procedure", "medication", "lab", "vital", "static", "other"];
const DAY = 86400000;
const HATCH = "hatch";

function visitsOf(answer) {
  if (data.record) return data.record.visits.map(([start, end, name]) => ({ start, end, name }));
  const found = new Map();
  for (const item of answer.rows) {
    const number = items.visit[item],
      time = items.time[item];
    if (!number || time === null) continue;
    const visit = found.get(number);
    if (!visit) found.set(number, { start: time, end: time, name: "visit" });
    else {
      visit.start = Math.min(visit.start, time);
      visit.end = Math.max(visit.end, time);
    }
  }
  return [...found.values()];
}

// The answer whose scores tell the risk on the way: this one, or another method's to the same question.
function courseOf(answer) {
  return [answer, ...data.answers].find((each) => each.task === answer.task && each.after) || null;
}

function extent(answer) {
  const all = [];
  for (let item = 0; item < items.time.length; item++) {
    const time = items.time[item];
    if (time !== null && kindOf(item) !== "birth" && kindOf(item) !== "static") all.push(time);
  }
  for (const visit of visitsOf(answer)) all.push(visit.start, visit.end);
  if (data.record) {
    times(data.record.otherTime).forEach((time, place) => {
      if (text(data.record.otherKind[place]) !== "birth") all.push(time);
    });
  }
  if (data.time !== null) all.push(data.time);
  if (!all.length) return null;
  let first = all[0],
    last = all[0];
  for (const time of all) {
    if (time < first) first = time;
    if (time > last) last = time;
  }
  return [first, last];
}

const SPANS = [
  ["10 years", 3652 * DAY],
  ["2 years", 730 * DAY],
  ["90 days", 90 * DAY],
  ["7 days", 7 * DAY],
  ["1 day", DAY],
];
function spansOf(answer) {
  const whole = extent(answer);
  if (!whole) return [];
  const long = whole[1] - whole[0];
  return [["whole record", long], ...SPANS.filter(([, length]) => length < long * 0.8)];
}

function timeTicks(first, last, most) {
  const steps = [1 / 24, 3 / 24, 6 / 24, 12 / 24, 1, 2, 7, 14].map((days) => days * DAY);
  const step = steps.find((each) => (last - first) / each <= most);
  const ticks = [];
  if (step) {
    for (let at = Math.ceil(first / step) * step; at <= last; at += step) {
      ticks.push([at, step < DAY ? (clock(at) === "00:00" ? day(at).slice(5) : clock(at)) : day(at).slice(5)]);
    }
    return { ticks, unit: step < DAY ? "hours" : "days" };
  }
  const months = [1, 2, 3, 6, 12, 24, 60, 120].find((each) => (last - first) / (each * 30.44 * DAY) <= most) || 240;
  const start = new Date(first);
  let month = start.getUTCFullYear() * 12 + start.getUTCMonth() + 1;
  month = Math.ceil(month / months) * months;
  for (; ; month += months) {
    const at = Date.UTC(Math.floor(month / 12), month % 12, 1);
    if (at > last) break;
    ticks.push([
      at,
      months >= 12 ? String(Math.floor(month / 12)) : `${Math.floor(month / 12)}-${two((month % 12) + 1)}`,
    ]);
  }
  return { ticks, unit: "months" };
}

function drawRecord(answer, spanLength, openVisit) {
  const holder = byId("record");
  const whole = extent(answer);
  if (!whole) {
    holder.replaceChildren(make("p", {}, "The record has no event with a time."));
    return;
  }
  const last = whole[1],
    first = Math.max(whole[0], last - spanLength);
  const wide = width(holder),
    left = wide < 560 ? 86 : 110,
    right = 26;
  const long = Math.max(last - first, DAY / 24);
  const x = (time) => left + ((time - first) / long) * (wide - left - right);
  const shown = (time) => time !== null && time >= first && time <= last;

  // Events of all explanations: one of groups has none of its own.
  const byKind = new Map();
  const tick = (kind, time, how) => {
    if (!LINES.includes(kind) || !shown(time)) return;
    if (!byKind.has(kind)) byKind.set(kind, { seen: new Set(), unseen: new Set() });
    byKind.get(kind)[how].add(Math.round(2 * x(time)) / 2);
  };
  items.time.forEach(
    (time, item) => items.event[item] >= 0 && items.group[item] < 0 && tick(kindOf(item), time, "seen"),
  );
  if (data.record) {
    const how = data.record.seenIsKnown ? "unseen" : "seen";
    times(data.record.otherTime).forEach((time, place) => tick(text(data.record.otherKind[place]), time, how));
  }
  const lines = LINES.filter((kind) => byKind.has(kind));
  const visits = visitsOf(answer).filter((visit) => visit.end >= first && visit.start <= last);
  const course = courseOf(answer);
  const row = 26,
    rows = lines.length + (visits.length ? 1 : 0),
    riskTop = rows * row + 34,
    riskHigh = 110;
  const bottom = course ? riskTop + riskHigh : rows * row + 6,
    high = bottom + 30;
  const picture = canvasOf(
    holder,
    wide,
    high,
    `Timeline from ${day(first)} to ${day(last)}: ${count(visits.length, "visit")}, ` +
      lines.map((kind) => kindName(kind)).join(", ") +
      (course ? ", and the risk after every event" : ""),
  );

  // 1. Axis of time.
  const { ticks } = timeTicks(first, last, Math.max(2, (wide - left) / 80));
  for (const [at, name] of ticks) {
    picture.append(
      draw("line", { x1: x(at), x2: x(at), y1: 4, y2: bottom, class: "grid" }),
      label(x(at), bottom + 16, name, { "text-anchor": "middle", class: "soft" }),
    );
  }
  // 2. Visits: bars at least two pixels wide; a click opens the visit below.
  let y = row / 2;
  if (visits.length) {
    picture.append(label(left - 10, y + 4, "visits", { "text-anchor": "end" }));
    for (const visit of visits) {
      const from = x(Math.max(first, visit.start)),
        to = x(Math.min(last, visit.end));
      const shape = draw(
        "rect",
        {
          x: from,
          y: y - 8,
          width: Math.max(2, to - from),
          height: 16,
          class: `visit ${visit.name === "admission" ? "admission" : visit.name === "emergency" ? "emergency" : ""}`,
        },
        title(`${visit.name}, ${span(visit.start, visit.end)}`),
      );
      shape.addEventListener("click", () => openVisit(visit));
      picture.append(shape);
    }
    y += row;
  }
  // 3. Events: one path a kind, whatever their number.
  const heightOf = new Map();
  for (const kind of lines) {
    heightOf.set(kind, y);
    const path = (places, half) => [...places].map((place) => `M${place} ${y - half}v${2 * half}`).join("");
    picture.append(
      label(left - 10, y + 4, kindName(kind).split(" ")[0], { "text-anchor": "end" }),
      draw("path", { d: path(byKind.get(kind).seen, 7), class: "tick" }),
      draw("path", { d: path(byKind.get(kind).unseen, 3), class: "tick unseen" }),
    );
    y += row;
  }
  // 4. The largest contributions: triangles up and down, larger the more they weigh.
  const order = largest(answer, 24).filter(({ item }) => shown(items.time[item]) && heightOf.has(kindOf(item)));
  const most = order.length ? Math.abs(order[0].value) : 0;
  for (const { item, value } of order.reverse()) {
    const size = 4 + 4 * Math.sqrt(Math.abs(value) / most),
      at = x(items.time[item]),
      level = heightOf.get(kindOf(item));
    const up = value > 0 ? -1 : 1;
    picture.append(
      draw(
        "path",
        {
          d: `M${at - size} ${level - up * size * 0.7}h${2 * size}L${at} ${level + up * size}z`,
          class: value > 0 ? "mark raises" : "mark lowers",
        },
        title(`${nameOf(item)} ${valueOf(item)}, ${moment(items.time[item])}: ${signed(value)}`),
      ),
    );
  }
  // 5. The risk, as it went.
  if (course) drawCourse(picture, course, x, shown, [left, wide - right, riskTop, riskHigh], [first, last]);
  const remarks = order.length ? ["Triangles mark the largest contributions: up raises the risk, down lowers it."] : [];
  if (visits.length)
    remarks.push(data.record ? "Dark bars are admissions, hatched ones emergencies, light ones other visits." : "");
  if (course && course.method !== answer.method) remarks.push(`The risk on the way is by ${words(course.method)}.`);
  if (data.record && data.record.seenIsKnown && data.record.otherTime.length) {
    remarks.push("Short ticks are events that the model did not see.");
  }
  byId("record-note").textContent = remarks.filter(Boolean).join(" ");
}

function drawCourse(picture, course, x, shown, [left, right, top, high], [first, last]) {
  const points = [];
  course.rows.forEach((item, place) => {
    const time = items.time[item],
      score = course.after[place];
    if (time !== null && score !== null) points.push([time, score, items.visit[item]]);
  });
  points.sort((one, other) => one[0] - other[0]);
  const before = points.filter(([time]) => time < first).pop();
  const seen = points.filter(([time]) => shown(time));
  if (!seen.length && !before) return;
  let most = 0;
  for (const [, score] of [...seen, ...(before ? [before] : [])]) most = Math.max(most, score);
  const ends = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1];
  const end = ends.find((each) => each >= most * 1.02) || 1;
  const y = (score) => top + high - (Math.min(score, end) / end) * high;
  picture.append(label(left - 10, top - 12, "risk", { "text-anchor": "end" }));
  for (const share of [0, 0.5, 1]) {
    picture.append(
      draw("line", { x1: left, x2: right, y1: y(share * end), y2: y(share * end), class: "grid" }),
      label(left - 10, y(share * end) + 4, `${Number((share * end * 100).toPrecision(2))} %`, {
        "text-anchor": "end",
        class: "soft",
      }),
    );
  }
  // One step a pixel: its lowest, highest and last risk.
  let path = before ? `M${left} ${y(before[1]).toFixed(1)}` : "";
  for (let place = 0; place < seen.length;) {
    const column = Math.round(x(seen[place][0]));
    let low = 1,
      top1 = 0,
      final = 0;
    for (; place < seen.length && Math.round(x(seen[place][0])) === column; place++) {
      final = seen[place][1];
      low = Math.min(low, final);
      top1 = Math.max(top1, final);
    }
    const at = (score) => y(score).toFixed(1);
    path += path
      ? `H${column}V${at(top1)}V${at(low)}V${at(final)}`
      : `M${column} ${at(final)}V${at(top1)}V${at(low)}V${at(final)}`;
  }
  picture.append(draw("path", { d: `${path}H${Math.max(left, x(last))}`, class: "course" }));
  // A dot after the last event of every visit.
  const ending = new Map();
  for (const [time, score, visit] of seen) ending.set(visit || time, [time, score]);
  if (ending.size <= 150) {
    for (const [time, score] of ending.values()) {
      picture.append(
        draw(
          "circle",
          { cx: x(time), cy: y(score), r: 3, class: "dot" },
          title(`${percent(score)} after ${moment(time)}`),
        ),
      );
    }
  }
}
