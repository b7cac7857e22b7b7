// Weights that a model's layers give: a matrix over tokens, or a weight a token of a stay.

function decoded(weights) {
  if (weights.ready) return weights;
  weights.at = times(weights.time);
  weights.size = weights.code.length;
  weights.cells = weights.bytes.map((layer) =>
    layer.map((written) => Uint8Array.from(atob(written), (sign) => sign.charCodeAt(0))),
  );
  weights.ready = true;
  return weights;
}
// Shares of attention are percentages; other weights are numbers that sum to nothing.
const weightWords = (weights, number) => (weights.shares ? percent(number) : String(Number(number.toPrecision(3))));
const tokenName = (weights, place) => text(weights.display[place]) || text(weights.code[place]) || "token";
function tokenWords(weights, place) {
  const value = measured(weights.value[place], text(weights.unit[place]));
  const name = tokenName(weights, place) + (value ? ` ${value}` : "");
  return weights.at[place] === null ? name : `${name}, ${moment(weights.at[place])}`;
}

function selection(name, options, change) {
  const chooser = make("select", {}, ...options.map((option, place) => make("option", { value: place }, option)));
  chooser.addEventListener("change", () => change(Number(chooser.value)));
  return make("label", {}, `${name} `, chooser);
}

// The choice of weights, layer and head; `show` is called with them, and again when one changes.
function choosers(holder, all, show) {
  const state = { of: 0, layer: 0, head: 0 };
  const build = () => {
    const weights = decoded(all[state.of]);
    const parts = [];
    if (all.length > 1) {
      parts.push(
        selection(
          "Weights",
          all.map((each) => each.what),
          (of) => {
            Object.assign(state, { of, layer: 0, head: 0 });
            build();
          },
        ),
      );
      parts[0].lastChild.value = state.of;
    }
    if (weights.cells.length > 1) {
      const layers = selection("Layer", weights.numbers.map(String), (layer) => {
        Object.assign(state, { layer, head: 0 });
        build();
      });
      layers.lastChild.value = state.layer;
      parts.push(layers);
    }
    if (weights.cells[state.layer].length > 1) {
      parts.push(
        selection(
          "Head",
          weights.cells[state.layer].map((_, place) => String(place + 1)),
          (head) => {
            state.head = head;
            show(weights, state);
          },
        ),
      );
    }
    const at = [...holder.children].findIndex((part) => part.contains(document.activeElement));
    holder.replaceChildren(...parts);
    if (at >= 0 && parts[at]) parts[at].lastChild.focus();
    show(weights, state);
  };
  build();
  return () => show(decoded(all[state.of]), state);
}

// -- the matrix --

function startMatrix(all) {
  const canvas = byId("matrix"),
    readout = byId("cell");
  let weights,
    state,
    image,
    cell,
    at = null;
  const scale = () => weights.scale[state.layer][state.head] || 0;
  const paint = () => {
    const pen = canvas.getContext("2d"),
      size = weights.size,
      side = size * cell;
    pen.clearRect(0, 0, side, side);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(image, 0, 0, side, side);
    if (!at) return;
    pen.strokeStyle = getComputedStyle(document.body).getPropertyValue("--raise");
    pen.strokeRect(0.5, at[0] * cell + 0.5, side - 1, Math.max(1, cell - 1));
    pen.strokeRect(at[1] * cell + 0.5, 0.5, Math.max(1, cell - 1), side - 1);
  };
  const tell = () => {
    if (!at) {
      readout.textContent =
        "Point at a cell, or move with the arrow keys: a row is the token that looks, a column the one it looks at.";
      return;
    }
    const share = (weights.cells[state.layer][state.head][at[0] * weights.size + at[1]] / 255) * scale();
    const [one, other] = at.map((place) => `${place + 1} · ${tokenWords(weights, place)}`);
    readout.textContent = `${one} looks at ${other}: ${weightWords(weights, share)}`;
  };
  const show = (...given) => {
    [weights, state] = given;
    const size = weights.size,
      cells = weights.cells[state.layer][state.head];
    if (at && (at[0] >= size || at[1] >= size)) at = null;
    cell = Math.max(1, Math.min(14, Math.floor(Math.min(canvas.parentElement.clientWidth || 700, 760) / size)));
    canvas.width = canvas.height = size * cell;
    image = document.createElement("canvas");
    image.width = image.height = size;
    const pen = image.getContext("2d"),
      pixels = pen.createImageData(size, size);
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const ink = dark ? 221 : 34;
    for (let place = 0; place < cells.length; place++) {
      pixels.data[4 * place] = ink;
      pixels.data[4 * place + 1] = ink + 10;
      pixels.data[4 * place + 2] = ink + 20;
      pixels.data[4 * place + 3] = 255 * Math.sqrt(cells[place] / 255);
    }
    pen.putImageData(pixels, 0, 0);
    canvas.setAttribute(
      "aria-label",
      `${weights.what}: ${size} × ${size} tokens, layer ${weights.numbers[state.layer]}`,
    );
    byId("attention-note").textContent = [
      weights.what + ".",
      ...weights.remarks,
      `Darkest: ${weightWords(weights, scale())}; the square root of a weight is drawn.`,
      "Attention says where a layer looks, not what the risk is made of.",
    ].join(" ");
    paint();
    tell();
  };
  const point = (event) => {
    const box = canvas.getBoundingClientRect();
    const place = (part, whole) => Math.max(0, Math.min(weights.size - 1, Math.floor((part / whole) * weights.size)));
    at = [place(event.clientY - box.top, box.height), place(event.clientX - box.left, box.width)];
    paint();
    tell();
  };
  for (const moved of ["pointermove", "pointerdown"]) canvas.addEventListener(moved, point);
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    const last = weights.size - 1,
      [row, column] = at || [last, last];
    at = at
      ? [Math.max(0, Math.min(last, row + move[0])), Math.max(0, Math.min(last, column + move[1]))]
      : [last, last];
    paint();
    tell();
  });
  byId("attention").hidden = false;
  return choosers(byId("attention-controls"), all, show);
}

// -- weights over a stay --

const MOST_VARIABLES = 30;
function startWeights(all) {
  byId("fusion").hidden = false;
  return choosers(byId("fusion-controls"), all, drawWeights);
}
function drawWeights(weights, state) {
  const cells = weights.cells[state.layer][state.head],
    scale = (weights.scale[state.layer][state.head] || 0) / 255;
  const byName = new Map();
  for (let place = 0; place < weights.size; place++) {
    const name = tokenName(weights, place);
    if (!byName.has(name)) byName.set(name, { name, sum: 0, places: [] });
    const group = byName.get(name);
    group.sum += cells[place] * scale;
    group.places.push(place);
  }
  const all = [...byName.values()].filter((line) => line.sum > 0).sort((one, other) => other.sum - one.sum),
    lines = all.slice(0, MOST_VARIABLES);
  const timed = weights.at.filter((time) => time !== null);
  const first = timed.reduce((least, time) => Math.min(least, time), Infinity);
  const last = timed.reduce((most, time) => Math.max(most, time), -Infinity);
  const holder = byId("weights"),
    wide = width(holder),
    left = wide < 560 ? 120 : 210,
    right = 66,
    row = 24;
  const long = Math.max(1, last - first),
    x = (time) => left + ((time - first) / long) * (wide - left - right - 6);
  const bottom = lines.length * row + 4;
  const picture = canvasOf(
    holder,
    wide,
    bottom + 26,
    `${weights.what}: the weights of ${lines.length} variables over time`,
  );
  if (timed.length) {
    for (const [at, name] of timeTicks(first, last, Math.max(2, (wide - left) / 80)).ticks) {
      picture.append(
        draw("line", { x1: x(at), x2: x(at), y1: 0, y2: bottom, class: "grid" }),
        label(x(at), bottom + 16, name, { "text-anchor": "middle", class: "soft" }),
      );
    }
  }
  const most = cells.reduce((found, value) => Math.max(found, value), 0) || 1;
  const mostLetters = wide < 560 ? 15 : 25;
  lines.forEach((line, place) => {
    const base = place * row + row - 3;
    const short = line.name.length > mostLetters ? `${line.name.slice(0, mostLetters - 1)}…` : line.name;
    picture.append(
      label(left - 10, base - 4, short, { "text-anchor": "end" }),
      draw("line", { x1: left, x2: wide - right, y1: base, y2: base, class: "grid" }),
    );
    for (const at of line.places) {
      const time = weights.at[at],
        high = Math.max(0.5, (cells[at] / most) * (row - 5));
      picture.append(
        draw(
          "rect",
          { x: (time === null ? left : x(time)) - 1.5, y: base - high, width: 3, height: high, class: "weight" },
          title(`${tokenWords(weights, at)}: ${weightWords(weights, cells[at] * scale)}`),
        ),
      );
    }
    picture.append(label(wide - right + 8, base - 4, weightWords(weights, line.sum), {}));
  });
  byId("fusion-note").textContent = [
    weights.what + ".",
    ...weights.remarks,
    "A bar is a measurement, its height the weight; at the right the sum of the variable.",
    timed.length < weights.size ? "What has no time stands at the left." : "",
    all.length > lines.length ? `${count(all.length - lines.length, "variable")} of smaller weight not drawn.` : "",
    "Weights say what the model mixes, not whether it raises or lowers the risk.",
  ]
    .filter(Boolean)
    .join(" ");
}
