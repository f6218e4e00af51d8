const ROOM = { top: 16, right: 28, bottom: 52, left: 28 }; // around a chart, for the labels of its axes
const ROOM_OF_NUMBERS = 64; // at the left, where an axis of numbers stands there
const CHARACTER_WIDTH = 7; // about, in pixels
const LINE_HEIGHT = 15;
const MARK_ROOM = 12; // pixels from the middle of a row's marks to their edge

function styleValue(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function seriesColors() {
  return styleValue("--series").split(",").map((color) => color.trim());
}

/** The width of a chart's plot in pixels; `left`: the room for labels at its left. */
function widthOf(id, left = ROOM.left) {
  return Math.max(120, byId(id).clientWidth - left - ROOM.right);
}

/** Draw a chart in the page's colors; `description` is what a screen reader says of it. The room for labels is fixed:
 * when Vega finds it by itself (autosize), labels that it had hidden at first reach over the edge. */
function draw(id, description, { left = ROOM.left, ...spec }) {
  const width = widthOf(id, left);
  const text = styleValue("--text"), soft = styleValue("--soft"), line = styleValue("--line");
  const axis = {
    labelColor: text, titleColor: soft, gridColor: line, domainColor: line, tickColor: line,
    labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", labelOverlap: true, labelSeparation: 8,
  };
  // Each number stands below its tick, those at the ends too: Vega would push these inwards, onto their neighbors.
  const axisX = { labelFlush: false, labelPadding: 4, tickCount: Math.max(2, Math.floor(width / 70)) };
  const config = {
    background: "transparent", font: "system-ui, sans-serif", view: { stroke: null }, range: { category: seriesColors() },
    axis, axisX, axisY: { labelLimit: ROOM_OF_NUMBERS - 8 },
  };
  // ast: expressions are interpreted, since the page's policy allows no eval.
  const options = { actions: false, renderer: "svg", ast: true };
  const tooltip = { theme: darkMode.matches ? "dark" : "light" };
  const size = { width, padding: { ...ROOM, left }, autosize: "none" };
  return vegaEmbed(byId(id), { ...size, description, config, ...spec }, { ...options, tooltip });
}

/** A model has one color in every chart. Legends are the page's own: Vega's do not break into lines. */
function color(field) {
  return { field, type: "nominal", scale: { domain: [...data.models, "(references)"] }, legend: null };
}

/** List what colors and strokes mean: names of models, and [text, class] of anything else. */
function fillLegend(id, names, others = []) {
  const colors = seriesColors();
  byId(id).replaceChildren(...[...names.map((name) => [name, "swatch"]), ...others].map(([name, style], index) => {
    const swatch = make("span", { class: style, "aria-hidden": "true" });
    if (index < names.length) swatch.style.background = colors[data.models.indexOf(name) % colors.length];
    return make("li", {}, swatch, name);
  }));
}

/** The text without its middle if it is too long: names of models differ at the ends. */
function shorten(text, numCharacters) {
  const half = Math.floor(numCharacters / 2) - 1;
  return text.length > numCharacters ? `${text.slice(0, half)}…${text.slice(-half)}` : text;
}

/** Rows of a chart with a name each, which stands above its row's marks and so has the whole width: beside them, long
 * names were cut to the same few letters and left no room for the marks. `names[row]` is a list of lines. Gives the
 * chart's height and the encoding of y, from a field `row`, the row's number. */
function rowsOf(id, names) {
  const width = widthOf(id), numLines = Math.max(...names.map((lines) => lines.length));
  const shown = names.map((lines) => lines.map((line) => shorten(line, width / CHARACTER_WIDTH)));
  const axis = {
    labelExpr: `${JSON.stringify(shown)}[datum.value]`, labelLimit: width, labelAlign: "left", labelOverlap: false,
    labelBaseline: "bottom", labelOffset: -MARK_ROOM - LINE_HEIGHT * (numLines - 1), labelLineHeight: LINE_HEIGHT,
    labelPadding: 0, ticks: false, domain: false, zindex: 1,
  };
  const height = names.length * (2 * MARK_ROOM + LINE_HEIGHT * numLines + 8);
  return { height, y: { field: "row", type: "ordinal", title: null, axis } };
}
