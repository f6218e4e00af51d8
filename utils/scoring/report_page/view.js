/** The view in the URL: after the #, what is not as it is at first, so that a link or a reload shows the same again. */
const CHOICES = ["metric", "protocol", "pair", "filter", "mark"];
const SAVING_DELAY = 300; // milliseconds; browsers refuse to change the URL with every letter of a search
let defaults = {}, timer = null, drawnWidth = document.body.clientWidth;

function readView() {
  const chosen = Object.fromEntries(CHOICES.map((id) => [id, byId(id).value]));
  const order = state.descending ? "descending" : "ascending";
  return { ...chosen, search: byId("search").value.trim(), sort: state.sort, order, dialogue: state.linked };
}

/** The URL's view; null for a place in the page, as #dialogues, and where there is nothing. */
function viewInUrl() {
  const found = new URLSearchParams(location.hash.slice(1));
  return Object.keys(defaults).some((key) => found.has(key)) ? found : null;
}

function saveView() {
  const differing = Object.entries(readView()).filter(([key, value]) => value !== defaults[key]);
  if (differing.length || viewInUrl()) history.replaceState(null, "", `#${new URLSearchParams(differing)}`);
}

function saveViewSoon() {
  clearTimeout(timer);
  timer = setTimeout(saveView, SAVING_DELAY);
}

/** Show a view; what it does not say, or says of models and columns that are not there, is as at first. */
function showView(given) {
  const view = { ...defaults, ...Object.fromEntries(given) };
  CHOICES.forEach((id) => {
    const isKnown = [...byId(id).options].some((option) => option.value === view[id]);
    byId(id).value = isKnown && !byId(id).closest("label").hidden ? view[id] : defaults[id];
  });
  byId("search").value = view.search;
  const isSorted = columns().some(([key]) => key === view.sort);
  state.sort = isSorted ? view.sort : defaults.sort;
  state.descending = (["ascending", "descending"].includes(view.order) ? view.order : defaults.order) === "descending";
  state.linked = null;
  const chosen = chooseDialogues(), isLinked = chosen.some((one) => one.id === view.dialogue);
  if (!isLinked && chosen.length) state.open.add(chosen[0].id);
  showTable();
  drawAll().then(() => isLinked && goTo(view.dialogue)); // until then the page grows
}

/** To the sample's entry, whatever was searched for. */
function showSample(event) {
  event.preventDefault();
  const id = new URLSearchParams(event.currentTarget.hash.slice(1)).get("dialogue");
  if (!chooseDialogues().some((one) => one.id === id)) byId("search").value = "", byId("filter").value = "all";
  goTo(id);
}

/** Say of a table that it scrolls sideways, where it does. */
function hintAtScrolling() {
  const watcher = new ResizeObserver((changes) => changes.forEach(({ target }) => {
    const box = target.closest(".wide");
    box.previousElementSibling.hidden = box.scrollWidth <= box.clientWidth;
  }));
  document.querySelectorAll(".wide, .wide > table").forEach((element) => watcher.observe(element));
}

function fillChoices() {
  fillSelect("metric", data.metrics.map((metric) => [metric, metricNames[metric]]));
  fillSelect("protocol", data.protocols.map((protocol) => [protocol, protocolNames[protocol]]));
  if (data.models.length > 1) listPairs().forEach(([name, pair]) => pairs.set(name, pair));
  fillSelect("pair", [...pairs.keys()].map((name) => [name, name]));
  fillSelect("mark", [["", "the closest reference"], ...data.models.map((name) => [name, name])]);
  document.querySelectorAll(".of_pairs").forEach((label) => { label.hidden = data.models.length < 2; });
  if (data.models.length < 2) Object.assign(state, { sort: `model ${data.models[0]}`, descending: false });
}

function listen() {
  darkMode.addEventListener("change", drawAll);
  window.addEventListener("resize", () => {
    if (document.body.clientWidth !== drawnWidth) drawAll(); // not when a phone hides its address bar
    drawnWidth = document.body.clientWidth;
  });
  window.addEventListener("hashchange", () => {
    const view = viewInUrl();
    if (view || !location.hash) showView(view || []);
    else saveView(); // a place in the page took the view's place
  });
  byId("choice").addEventListener("change", () => { drawAll(); showTable(); });
  byId("search").addEventListener("input", showTable);
  // Not for the search field, whose change event comes with the click that leaves it: the row clicked would be gone.
  byId("browse").querySelectorAll("select").forEach((select) => select.addEventListener("change", showTable));
  ["choice", "browse"].forEach((id) => byId(id).addEventListener("submit", (event) => event.preventDefault()));
  byId("more").addEventListener("click", () => { state.all = true; showTable(); });
  byId("to_sample")?.addEventListener("click", showSample);
}

fillChoices();
defaults = readView();
listen();
hintAtScrolling();
showView(viewInUrl() || []);
