function drawForest() {
  const metric = byId("metric").value, protocol = byId("protocol").value;
  const values = data.comparisons.map(({ pair, scores }, row) => {
    const { difference, low, high, ...others } = scores[protocol][metric];
    return { row, pair: pair.join(" minus "), difference: 100 * difference, low: 100 * low, high: 100 * high, ...others };
  });
  const fits = values.every(({ pair }) => pair.length <= widthOf("forest") / CHARACTER_WIDTH);
  const names = data.comparisons.map(({ pair: [a, b] }) => fits ? [`${a} minus ${b}`] : [`${a} minus`, b]);
  const { height, y } = rowsOf("forest", names);
  const verdicts = ["above", "below", "noise"];
  const shade = {
    field: "verdict", type: "nominal", legend: null,
    scale: { domain: verdicts, range: [styleValue("--above"), styleValue("--below"), styleValue("--soft")] },
  };
  const tooltip = [
    { field: "pair" }, { field: "difference", format: "+.2f" }, { field: "low", format: "+.2f" },
    { field: "high", format: "+.2f" }, { field: "p_value", format: ".3f" },
    { field: "p_value_holm", format: ".3f" },
  ];
  const x = { field: "low", type: "quantitative", title: `difference in ${metricNames[metric]}, points` };
  return draw("forest", "Differences of every two models with 95 % intervals; the table below has the numbers", {
    height, data: { values },
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

/** An axis of numbers that are never fractions; from a million on as 1.5M, which fits below its tick. */
function wholeNumbers(values) {
  const format = values.some((value) => value >= 1e6) ? "~s" : ",d";
  return { tickMinStep: 1, labelExpr: `format(datum.value, "${format}")` };
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
    const [shortest, longest] = [group[0].words, group[group.length - 1].words];
    const length = shortest === longest ? `${shortest}` : `${shortest}–${longest}`;
    const estimates = estimate(group.map((dialogue) => scoreOf(dialogue, model)));
    return { length, order, name, ...estimates, dialogues: group.length };
  }));
  // Every group keeps its label, so these break into two lines where the groups are narrow.
  const labels = [...new Set(values.map(({ length }) => length))];
  const room = widthOf("by_length", ROOM_OF_NUMBERS) / labels.length / CHARACTER_WIDTH;
  const isTight = labels.some((label) => label.length + 1 > room);
  const shown = labels.map((label) => isTight ? label.split(/(?<=–)/) : label);
  const labelExpr = `${JSON.stringify(shown)}[indexof(${JSON.stringify(labels)}, datum.value)]`;
  const x = {
    field: "length", type: "ordinal", sort: { field: "order" }, title: "words in the dialogue",
    axis: { labelAngle: 0, labelOverlap: false, labelExpr },
  };
  const title = metricNames[byId("metric").value], y = { field: "low", type: "quantitative", title };
  const tooltip = ["name", "length", "dialogues"].map((field) => ({ field })).concat(
    ["score", "low", "high"].map((field) => ({ field, format: ".1f" })));
  const shared = { x, xOffset: { field: "name", scale: { domain: data.models, paddingOuter: 1.5 } }, tooltip };
  fillLegend("by_length_legend", data.models);
  return draw("by_length", "Mean score of each model by length of the dialogue", {
    left: ROOM_OF_NUMBERS, height: 260, data: { values }, encoding: { ...shared, color: color("name") },
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
  const { height, y } = rowsOf(id, names.map((name) => [name]));
  const shade = color("name");
  return draw(id, description, {
    height, data: { values: values.map((value) => ({ ...value, row: names.indexOf(value.name) })) },
    layer: [
      { mark: { type: "tick", thickness: 1.5, opacity: 0.35, size: 2 * MARK_ROOM }, encoding: { y, x, color: shade } },
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
  const byScore = drawDistribution("score_distribution", "Scores of each model's dialogues", data.models, scores, {
    field: "value", type: "quantitative", title, scale: { domain: [0, 100] },
  });
  const lengths = data.dialogues.flatMap((one) => [
    ...one.references.map((text) => ({ name: "(references)", value: countWords(text) })),
    ...one.texts.map((text, model) => ({ name: data.models[model], value: countWords(text) })),
  ]);
  const names = ["(references)", ...data.models];
  const texts = "Lengths of the references and of each model's texts";
  const byLength = drawDistribution("length_distribution", texts, names, lengths, {
    field: "value", type: "quantitative", title: "words", axis: wholeNumbers(lengths.map(({ value }) => value)),
  });
  return [byScore, byLength];
}

function drawCurves() {
  byId("curves_figure").hidden = !data.curves.length;
  const values = data.curves.flatMap(([name, curves]) => Object.entries(curves).flatMap(
    ([split, points]) => points.map(([update, loss]) => ({ name, split, update, loss }))));
  if (!values.length) return null;
  const scale = { domain: ["train", "validation"], range: [[], [5, 4]] };
  const dash = { field: "split", type: "nominal", scale, legend: null };
  const splits = scale.domain.filter((split) => values.some((point) => point.split === split));
  const names = data.models.filter((name) => values.some((point) => point.name === name));
  fillLegend("curves_legend", names, splits.map((split) => [split, `stroke ${split}`]));
  const isPoint = data.curves.some(([, curves]) => Object.values(curves).some((points) => points.length === 1));
  return draw("curves", "Training and validation loss by update", {
    left: ROOM_OF_NUMBERS, height: 260, data: { values }, mark: { type: "line", strokeWidth: 2, point: isPoint },
    encoding: {
      x: { field: "update", type: "quantitative", title: "optimizer updates", axis: wholeNumbers(values.map(({ update }) => update)) },
      y: { field: "loss", type: "quantitative", title: null },
      color: color("name"), strokeDash: dash, tooltip: ["name", "split", "update", "loss"].map((field) => ({ field })),
    },
  });
}

function drawAll() {
  const forest = data.comparisons.length ? [drawForest()] : [];
  return Promise.all([...forest, drawByLength(), ...drawDistributions(), drawCurves()]);
}
