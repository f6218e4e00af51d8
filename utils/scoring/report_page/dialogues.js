const FIRST_ROWS = 100; // what is drawn at once; the rest on demand
// `linked`: the id of the dialogue that the URL leads to.
const state = { sort: "change", descending: true, open: new Set(), linked: null, all: false };
const pairs = new Map(); // of models, by name
const haystacks = data.dialogues.map((one) =>
  [one.id, one.dialogue, ...one.references, ...one.texts].join("\n").toLowerCase());

/** [A, B] as numbers of models: the change is A minus B. */
function chosenPair() {
  return pairs.get(byId("pair").value) || null;
}

function changeOf(dialogue) {
  const pair = chosenPair();
  return pair ? scoreOf(dialogue, pair[0]) - scoreOf(dialogue, pair[1]) : 0;
}

/** Columns: [key, title, value for sorting, text, class]. */
function columns() {
  const pair = chosenPair();
  const format = (value) => value.toFixed(1);
  const signed = (value) => (value > 0 ? "+" : "") + value.toFixed(1);
  const models = data.models.map((name, model) => [
    `model ${name}`, name, (one) => scoreOf(one, model), format, pair && !pair.includes(model) ? "other" : "",
  ]);
  const change = pair ? [["change", "change", changeOf, signed, "change"]] : [];
  return [["id", "dialogue", (one) => one.id, String, ""], ...change, ...models,
    ["words", "words", (one) => one.words, String, "other"]];
}

function isShown(dialogue, index) {
  const change = changeOf(dialogue);
  const filter = byId("filter").value;
  if (filter === "better" && change <= 0) return false;
  if (filter === "worse" && change >= 0) return false;
  if (filter === "same" && change !== 0) return false;
  return haystacks[index].includes(byId("search").value.trim().toLowerCase());
}

/** The chosen dialogues in order; by change the largest first, whether for better or for worse. */
function chooseDialogues() {
  const column = columns().find(([key]) => key === state.sort) || columns()[0];
  const keyed = data.dialogues
    .filter(isShown)
    .map((one) => [state.sort === "change" && state.descending ? Math.abs(column[2](one)) : column[2](one), one]);
  const order = state.descending ? -1 : 1;
  const compare = (a, b) => typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
  return keyed.sort((a, b) => order * compare(a[0], b[0])).map(([, one]) => one);
}

function normalize(word) {
  return word.toLowerCase().replace(/[^\p{L}\p{N}]/gu, "");
}

/** Which of the words are not in a longest common subsequence with the other words. */
function findDiffering(words, others) {
  const length = words.map(() => new Uint16Array(others.length + 1)).concat([new Uint16Array(others.length + 1)]);
  for (let i = words.length - 1; i >= 0; i--) {
    for (let j = others.length - 1; j >= 0; j--) {
      length[i][j] = words[i] === others[j] ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
    }
  }
  const differing = words.map(() => true);
  for (let i = 0, j = 0; i < words.length && j < others.length;) {
    if (words[i] === others[j]) { differing[i] = false; i++; j++; }
    else if (length[i + 1][j] >= length[i][j + 1]) i++;
    else j++;
  }
  return differing;
}

/** The text with the words that the other text lacks marked; nothing marked without another. */
function markText(text, other) {
  if (!text.trim()) return [make("span", { class: "empty" }, "(empty)")];
  if (other === null) return [text];
  const split = (value) => value.split(/\s+/).map(normalize).filter(Boolean);
  const pieces = text.split(/(\s+)/);
  const places = pieces.map((piece, index) => index).filter((index) => normalize(pieces[index]));
  const differing = findDiffering(places.map((index) => normalize(pieces[index])), split(other));
  const marked = new Set(places.filter((_, index) => differing[index]));
  return pieces.map((piece, index) => marked.has(index) ? make("mark", {}, piece) : piece);
}

/** What a model's text is marked against: the reference it scores best with, or another model's text. */
function otherText(dialogue, model) {
  const choice = byId("mark").value;
  const chosen = data.models.indexOf(choice); // none for the reference, whose value is empty
  if (chosen >= 0) return chosen === model ? null : dialogue.texts[chosen];
  const scores = dialogue.scores[model][byId("metric").value];
  return dialogue.references[scores.indexOf(Math.max(...scores))];
}

function makeDetail(dialogue, numColumns) {
  const turns = dialogue.dialogue.split("\n").map((turn) => {
    const speaker = turn.match(/^[^:]{1,30}:/);
    return speaker
      ? make("div", {}, make("span", { class: "speaker" }, speaker[0]), turn.slice(speaker[0].length))
      : make("div", {}, turn);
  });
  const texts = make("dl", {});
  dialogue.references.forEach((text, index) => {
    const label = dialogue.references.length > 1 ? `reference ${index + 1}` : "reference";
    texts.append(make("dt", {}, label), make("dd", { class: "reference" }, text));
  });
  data.models.forEach((name, model) => {
    const cut = dialogue.truncated[model] ? ", cut at max_new_tokens" : "";
    const label = `${name} · ${scoreOf(dialogue, model).toFixed(1)}${cut}`;
    const pieces = markText(dialogue.texts[model], otherText(dialogue, model));
    const missing = dialogue.unsupported[model] && ` · not in the dialogue: ${dialogue.unsupported[model]}`;
    texts.append(make("dt", {}, label, make("span", { class: "below" }, missing)), make("dd", { class: "text" }, ...pieces));
  });
  const source = make("div", { class: "source" }, ...turns);
  const cell = make("td", { colspan: numColumns }, make("div", { class: "columns" }, source, texts));
  return make("tr", { class: "detail" }, cell);
}

function makeRow(dialogue, shape) {
  const isOpen = state.open.has(dialogue.id);
  const row = make("tr", {});
  shape.forEach(([key, , value, format, style]) => {
    const number = value(dialogue), text = format(number);
    if (key === "id") {
      const button = make("button", { type: "button", "aria-expanded": isOpen, "data-id": text }, `${isOpen ? "▾" : "▸"} ${text}`);
      button.addEventListener("click", () => toggle(dialogue, row, shape));
      row.append(make("td", {}, button));
    } else {
      const verdict = key !== "change" ? "" : number > 0 ? "above" : number < 0 ? "below" : "noise";
      row.append(make("td", { class: `${style} ${verdict}` }, text));
    }
  });
  return row;
}

function toggle(dialogue, row, shape) {
  const isOpen = !state.open.delete(dialogue.id);
  if (isOpen) {
    state.open.add(dialogue.id);
    state.linked = dialogue.id;
    row.after(makeDetail(dialogue, shape.length));
  } else {
    row.nextSibling.remove();
    if (state.linked === dialogue.id) state.linked = null;
  }
  saveViewSoon();
  const button = row.querySelector("button");
  button.setAttribute("aria-expanded", isOpen);
  button.textContent = `${isOpen ? "▾" : "▸"} ${dialogue.id}`;
}

function sortBy(key) {
  state.descending = state.sort === key ? !state.descending : key !== "id";
  state.sort = key;
  showTable();
  byId("table").querySelector(`button[data-key="${key}"]`).focus();
}

function showTable() {
  const shape = columns(), chosen = chooseDialogues();
  const head = shape.map(([key, title, , , style]) => {
    const sorted = state.sort === key ? (state.descending ? "descending" : "ascending") : "none";
    const arrow = sorted === "none" ? "" : state.descending ? " ↓" : " ↑";
    const button = make("button", { type: "button", "data-key": key }, title + arrow);
    button.addEventListener("click", () => sortBy(key));
    return make("th", { scope: "col", class: style, "aria-sort": sorted }, button);
  });
  byId("table").tHead.replaceChildren(make("tr", {}, ...head));
  const drawn = state.all ? chosen : chosen.slice(0, FIRST_ROWS);
  byId("table").tBodies[0].replaceChildren(...drawn.flatMap((one) => {
    const row = makeRow(one, shape);
    return state.open.has(one.id) ? [row, makeDetail(one, shape.length)] : [row];
  }));
  const pair = chosenPair();
  const what = pair ? `; change is ${data.models[pair[0]]} minus ${data.models[pair[1]]}, in points` : "";
  byId("count").textContent = `${chosen.length} of ${data.dialogues.length} dialogues${what}`;
  byId("more").hidden = drawn.length === chosen.length;
  saveViewSoon();
}

/** Open a dialogue of those that are shown and go to it. */
function goTo(id) {
  const place = chooseDialogues().findIndex((one) => one.id === id);
  if (place < 0) return;
  if (place >= FIRST_ROWS) state.all = true;
  state.open.add(id);
  state.linked = id;
  showTable();
  const button = [...byId("table").querySelectorAll("button[data-id]")].find((one) => one.dataset.id === id);
  button.scrollIntoView({ block: "center" }); // the form above sticks to the top and would cover it
  button.focus({ preventScroll: true });
}

/** [name, [A, B]] of the pairs to choose from: first the model with the best mean against the first model. */
function listPairs() {
  const means = data.models.map((_, model) => mean(data.dialogues.map((one) => scoreOf(one, model))));
  const best = means.indexOf(Math.max(...means.slice(1)), 1);
  const pairs = data.models.flatMap((_, a) => data.models.map((__, b) => [a, b])).filter(([a, b]) => a > b);
  pairs.sort((one, other) => (other[0] === best && other[1] === 0) - (one[0] === best && one[1] === 0));
  return pairs.map(([a, b]) => [`${data.models[a]} minus ${data.models[b]}`, [a, b]]);
}
