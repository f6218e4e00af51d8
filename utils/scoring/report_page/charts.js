"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const darkMode = window.matchMedia("(prefers-color-scheme: dark)");
const metricNames = { rouge1: "ROUGE-1", rouge2: "ROUGE-2", rougeL: "ROUGE-L", rougeLsum: "ROUGE-Lsum" };
const protocolNames = {
  average: "the average of the references", max: "the best reference", first: "the first reference",
};

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

/** A dialogue's F1 in percent for one model, by the chosen metric and protocol. */
function scoreOf(dialogue, model) {
  const values = dialogue.scores[model][byId("metric").value];
  const protocol = byId("protocol").value;
  return 100 * (protocol === "average" ? mean(values) : protocol === "max" ? Math.max(...values) : values[0]);
}

function countWords(text) {
  return (text.match(/[\p{L}\p{N}_]+/gu) || []).length;
}

function styleValue(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** Draw a chart in the page's colors; `description` is what a screen reader says of it. */
function draw(id, description, spec) {
  const colors = styleValue("--series").split(",").map((color) => color.trim());
  const text = styleValue("--text"), soft = styleValue("--soft"), line = styleValue("--line");
  const axis = {
    labelColor: text, titleColor: soft, gridColor: line, domainColor: line, tickColor: line,
    labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", labelLimit: 170,
  };
  const config = {
    background: "transparent", font: "system-ui, sans-serif", view: { stroke: null }, axis,
    range: { category: colors },
    legend: { labelColor: text, titleColor: soft, orient: "top", labelFontSize: 12, symbolStrokeWidth: 3 },
  };
  const size = { width: "container", autosize: { type: "fit-x", contains: "padding" } };
  // ast: expressions are interpreted, since the page's policy allows no eval.
  const options = { actions: false, renderer: "svg", ast: true };
  const tooltip = { theme: darkMode.matches ? "dark" : "light" };
  return vegaEmbed(byId(id), { ...size, description, config, ...spec }, { ...options, tooltip });
}

/** A model has one color in every chart. */
function color(field, values) {
  const scale = { domain: [...data.models, "(references)"] };
  return { field, type: "nominal", title: null, scale, legend: { values } };
}

function drawForest() {
  const metric = byId("metric").value, protocol = byId("protocol").value;
  const values = data.comparisons.map(({ pair, scores }) => {
    const { difference, low, high, ...others } = scores[protocol][metric];
    const name = `${pair[0]} minus ${pair[1]}`;
    return { pair: name, difference: 100 * difference, low: 100 * low, high: 100 * high, ...others };
  });
  const verdicts = ["above", "below", "noise"];
  const shade = {
    field: "verdict", type: "nominal", legend: null,
    scale: { domain: verdicts, range: [styleValue("--above"), styleValue("--below"), styleValue("--soft")] },
  };
  const y = { field: "pair", type: "nominal", sort: null, title: null };
  const tooltip = [
    { field: "pair" }, { field: "difference", format: "+.2f" }, { field: "low", format: "+.2f" },
    { field: "high", format: "+.2f" }, { field: "p_value", format: ".3f" },
    { field: "p_value_holm", format: ".3f" },
  ];
  const x = { field: "low", type: "quantitative", title: `difference in ${metricNames[metric]}, points` };
  return draw("forest", "Differences of every two models with 95 % intervals; the table below has the numbers", {
    height: 30 * values.length, data: { values },
    layer: [
      { mark: { type: "rule", strokeDash: [4, 4], color: styleValue("--soft") }, encoding: { x: { datum: 0 } } },
      { mark: { type: "rule", strokeWidth: 3 }, encoding: { y, x, x2: { field: "high" }, color: shade, tooltip } },
      {
        mark: { type: "point", filled: true, size: 90, opacity: 1 },
        encoding: { y, x: { field: "difference", type: "quantitative" }, color: shade, tooltip },
      },
    ],
  });
}

/** At most 6 groups of dialogues of like length, of about 5 or more; those of the same length are in the same one. */
function groupByLength() {
  const sorted = [...data.dialogues].sort((a, b) => a.words - b.words);
  const numGroups = Math.max(1, Math.min(6, Math.floor(sorted.length / 5)));
  const groups = Array.from({ length: numGroups }, () => []);
  let last = 0;
  sorted.forEach((dialogue, index) => {
    const same = index > 0 && sorted[index - 1].words === dialogue.words;
    last = same ? last : Math.floor((index * numGroups) / sorted.length);
    groups[last].push(dialogue);
  });
  return groups.filter((group) => group.length);
}

function drawByLength() {
  const values = groupByLength().flatMap((group, order) => data.models.map((name, model) => {
    const scores = group.map((dialogue) => scoreOf(dialogue, model)), center = mean(scores);
    const squares = scores.map((score) => (score - center) ** 2);
    const half = 1.96 * Math.sqrt(mean(squares) / Math.max(1, scores.length - 1));
    const length = `${group[0].words}–${group[group.length - 1].words}`;
    return { length, order, name, score: center, low: center - half, high: center + half, dialogues: group.length };
  }));
  const x = {
    field: "length", type: "ordinal", sort: { field: "order" }, title: "words in the dialogue",
    axis: { labelAngle: 0 },
  };
  const title = metricNames[byId("metric").value], y = { field: "low", type: "quantitative", title };
  const tooltip = ["name", "length", "dialogues"].map((field) => ({ field })).concat(
    ["score", "low", "high"].map((field) => ({ field, format: ".1f" })));
  const shared = { x, xOffset: { field: "name", scale: { domain: data.models, paddingOuter: 1.5 } }, tooltip };
  return draw("by_length", "Mean score of each model by length of the dialogue", {
    height: 260, data: { values }, encoding: { ...shared, color: color("name", data.models) },
    layer: [
      { mark: { type: "rule", strokeWidth: 2, opacity: 0.7 }, encoding: { y, y2: { field: "high" } } },
      {
        mark: { type: "point", filled: true, size: 60, opacity: 1 },
        encoding: { y: { field: "score", type: "quantitative" } },
      },
    ],
  });
}

function drawDistribution(id, description, names, values, x) {
  const y = { field: "name", type: "nominal", sort: null, title: null, scale: { domain: names } };
  const shade = { ...color("name", names), legend: null };
  return draw(id, description, {
    height: 46 * names.length, data: { values },
    layer: [
      { mark: { type: "tick", thickness: 1.5, opacity: 0.35, bandSize: 30 }, encoding: { y, x, color: shade } },
      {
        mark: {
          type: "boxplot", extent: "min-max", size: 14, rule: false, ticks: false, opacity: 0.9,
          median: { color: styleValue("--page"), thickness: 3 },
        },
        encoding: { y, x, color: shade },
      },
    ],
  });
}

function drawDistributions() {
  const scores = data.models.flatMap((name, model) =>
    data.dialogues.map((one) => ({ name, value: scoreOf(one, model) })));
  const title = metricNames[byId("metric").value];
  drawDistribution("score_distribution", "Scores of single dialogues for each model", data.models, scores, {
    field: "value", type: "quantitative", title, scale: { domain: [0, 100] },
  });
  const lengths = data.dialogues.flatMap((one) => [
    ...one.references.map((text) => ({ name: "(references)", value: countWords(text) })),
    ...one.texts.map((text, model) => ({ name: data.models[model], value: countWords(text) })),
  ]);
  const names = ["(references)", ...data.models];
  drawDistribution("length_distribution", "Lengths of the references and of each model's texts", names, lengths, {
    field: "value", type: "quantitative", title: "words",
  });
}

function drawCurves() {
  byId("curves_figure").hidden = !data.curves.length;
  const values = data.curves.flatMap(([name, curves]) => Object.entries(curves).flatMap(
    ([split, points]) => points.map(([update, loss]) => ({ name, split, update, loss }))));
  if (!values.length) return null;
  const scale = { domain: ["train", "validation"], range: [[], [5, 4]] };
  const dash = { field: "split", type: "nominal", title: null, scale };
  return draw("curves", "Training and validation loss by update", {
    height: 260, data: { values }, mark: { type: "line", strokeWidth: 2 },
    encoding: {
      x: { field: "update", type: "quantitative", title: "optimizer updates" },
      y: { field: "loss", type: "quantitative", title: null },
      color: color("name", data.models.filter((name) => data.curves.some(([other]) => other === name))),
      strokeDash: dash, tooltip: ["name", "split", "update", "loss"].map((field) => ({ field })),
    },
  });
}

function drawAll() {
  byId("differences").hidden = !data.comparisons.length;
  if (data.comparisons.length) drawForest();
  drawByLength();
  drawDistributions();
  drawCurves();
}

function fillSelect(id, options) {
  byId(id).replaceChildren(...options.map(([value, label]) => new Option(label, value)));
}

fillSelect("metric", data.metrics.map((metric) => [metric, metricNames[metric]]));
fillSelect("protocol", data.protocols.map((protocol) => [protocol, protocolNames[protocol]]));
darkMode.addEventListener("change", drawAll);
byId("choice").addEventListener("change", drawAll);
byId("choice").addEventListener("submit", (event) => event.preventDefault());
drawAll();
