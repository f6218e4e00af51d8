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

/** Student's t between whose minus and plus are 95 %: exact for a freedom of 1 and 2, then as normal_to_t() in
 * significance.py, which is less than 1.2 % off. */
function studentT(freedom) {
  const z = (1.959964 * (8 * freedom + 3)) / (8 * freedom + 1);
  return [12.7062, 4.3027][freedom - 1] ?? Math.sqrt(freedom * Math.expm1(z ** 2 / freedom));
}

/** Mean and 95 % interval of scores in percent, cut where no score can be; one alone has no interval. */
function estimate(scores) {
  const center = mean(scores), freedom = scores.length - 1;
  if (!freedom) return { score: center, low: null, high: null };
  const squares = scores.map((score) => (score - center) ** 2);
  const half = studentT(freedom) * Math.sqrt(mean(squares) / freedom);
  return { score: center, low: Math.max(0, center - half), high: Math.min(100, center + half) };
}

function countWords(text) {
  return (text.match(/[\p{L}\p{N}_]+/gu) || []).length;
}

/** An element with text (never markup) or elements in it. */
function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  Object.entries(attributes).forEach(([name, value]) => element.setAttribute(name, value));
  element.append(...children);
  return element;
}

function fillSelect(id, options) {
  byId(id).replaceChildren(...options.map(([value, label]) => new Option(label, value)));
}
