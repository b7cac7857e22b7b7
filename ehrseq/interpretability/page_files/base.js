// What all parts need: the data as it was written, elements made of text, numbers and times in words.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const text = (place) => (place < 0 ? "" : data.strings[place]);
const SVG = "http://www.w3.org/2000/svg";

// Untrusted text enters as a text node, never as markup.
function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "onclick") element.addEventListener("click", value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}
const make = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

// Times are written as differences in milliseconds.
function times(differences) {
  let now = 0;
  return differences.map((step) => (step === null ? null : (now += step)));
}

const two = (number) => String(number).padStart(2, "0");
function day(time) {
  const at = new Date(time);
  return `${String(at.getUTCFullYear()).padStart(4, "0")}-${two(at.getUTCMonth() + 1)}-${two(at.getUTCDate())}`;
}
const clock = (time) => `${two(new Date(time).getUTCHours())}:${two(new Date(time).getUTCMinutes())}`;
const moment = (time) => (time === null ? "no time" : `${day(time)} ${clock(time)}`);
function span(first, last) {
  if (first === null) return "";
  if (first === last) return moment(first);
  const [from, to] = [day(first), day(last)];
  if (from === to) return `${moment(first)} to ${clock(last)}`;
  const shared = from.slice(0, 7) === to.slice(0, 7) ? 8 : from.slice(0, 4) === to.slice(0, 4) ? 5 : 0;
  return `${from} to ${to.slice(shared)}`;
}

const MINUS = "\u2212",
  NARROW = "\u00a0";
const grouped = (number) => number.toLocaleString("en");
const count = (number, one, many) => `${grouped(number)} ${number === 1 ? one : many || `${one}s`}`;
function signed(number) {
  const size = Math.abs(number);
  const digits = size >= 0.0995 || size === 0 ? 2 : size >= 0.00995 ? 3 : 4;
  const shown = size.toFixed(digits);
  if (Number(shown) === 0) return size === 0 ? "0" : "≈ 0";
  return (number < 0 ? MINUS : "+") + shown;
}
// What a contribution does to the odds, as far as anybody would say it.
function factor(number) {
  const odds = Math.exp(number);
  if (odds > 1000) return `> ×${NARROW}1,000`;
  if (odds < 0.001) return `< ×${NARROW}0.001`;
  return `×${NARROW}${odds >= 100 ? Math.round(odds) : odds.toPrecision(odds >= 0.1 ? 3 : 2)}`;
}
const risk = (logOdds) => 1 / (1 + Math.exp(-logOdds));
function percent(share) {
  const value = 100 * share;
  if (value > 0 && value < 0.01) return `< 0.01${NARROW}%`;
  if (value < 100 && value > 99.99) return `> 99.99${NARROW}%`;
  return `${value.toFixed(value >= 1 && value < 99.9 ? 1 : 2)}${NARROW}%`;
}
const words = (name) => name.replaceAll("_", " ");
function measured(value, unit) {
  if (value === null) return "";
  const number = Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4)));
  return (unit ? `${number} ${unit}` : number).replace("-", MINUS);
}

const KINDS = {
  diagnosis: "diagnoses",
  procedure: "procedures",
  medication: "medications",
  lab: "labs",
  vital: "vitals",
  static: "facts of the patient",
  other: "other events",
  visit_start: "starts of visits",
  visit_end: "ends of visits",
  birth: "birth",
  death: "death",
  structure: "marks of visits and intervals",
  question: "the question itself",
  time: "time that passes",
  visit: "visits",
  day: "days",
  hour: "hours",
  group: "groups",
};
const kindName = (kind) => KINDS[kind] || words(kind || "other");

// Rows of the items that an explanation speaks of.
const items = data.items;
items.time = times(items.time);
for (const answer of data.answers) {
  const rows = [];
  for (let run = 0; run < answer.runs.length; run += 2) {
    for (let step = 0; step < answer.runs[run + 1]; step++) rows.push(answer.runs[run] + step);
  }
  answer.rows = rows;
}
const kindOf = (item) => text(items.kind[item]);
function nameOf(item) {
  if (items.group[item] >= 0) return words(text(items.group[item]));
  const code = text(items.code[item]);
  if (items.display[item] >= 0) return text(items.display[item]);
  const edge = { visit_start: "start of visit", visit_end: "end of visit" }[kindOf(item)];
  return edge ? `${edge} (${classOf(code)})` : code;
}
const CLASSES = {
  IMP: "admission",
  ACUTE: "admission",
  NONAC: "admission",
  EMER: "emergency",
  AMB: "outpatient",
  ICU: "intensive care",
  OBSENC: "observation",
  HH: "at home",
  VR: "virtual",
};
const classOf = (code) => CLASSES[code.split("//").pop()] || code.split("//").pop();
const valueOf = (item) => measured(items.value[item], text(items.unit[item])) || text(items.text[item]);

// A group of buttons of which one is pressed.
function choices(holder, names, pressed, choose) {
  const buttons = names.map((name, place) =>
    make("button", { type: "button", "aria-pressed": String(place === pressed), onclick: () => choose(place) }, name),
  );
  const held =
    document.activeElement && holder.contains(document.activeElement)
      ? [...holder.children].indexOf(document.activeElement)
      : -1;
  holder.replaceChildren(...buttons);
  if (held >= 0 && buttons[held]) buttons[held].focus();
}

// A bar that starts in the middle: to the right it raises the risk, to the left, hatched, it lowers it.
function bar(value, largest) {
  const part = make("span", { class: value < 0 ? "lowers" : "raises" });
  const share = largest > 0 ? Math.min(1, Math.abs(value) / largest) : 0;
  part.style.width = `${(50 * share).toFixed(2)}%`;
  return make("span", { class: "bar", "aria-hidden": "true" }, part);
}

let paper = false;
const PAPER = 700;
function width(holder) {
  return paper ? PAPER : Math.max(300, Math.min(1100, Math.round(holder.clientWidth) || PAPER));
}
function canvasOf(holder, wide, high, label) {
  const picture = draw("svg", {
    viewBox: `0 0 ${wide} ${high}`,
    width: wide,
    height: high,
    role: "img",
    "aria-label": label,
  });
  holder.replaceChildren(picture);
  return picture;
}
const label = (x, y, content, attributes) => draw("text", { x, y, ...attributes }, content);
const title = (content) => draw("title", {}, content);
