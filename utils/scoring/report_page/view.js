fillSelect("metric", data.metrics.map((metric) => [metric, metricNames[metric]]));
fillSelect("protocol", data.protocols.map((protocol) => [protocol, protocolNames[protocol]]));
darkMode.addEventListener("change", drawAll);
byId("choice").addEventListener("change", drawAll);
let drawnWidth = document.body.clientWidth;
window.addEventListener("resize", () => {
  if (document.body.clientWidth !== drawnWidth) drawAll(); // not when a phone hides its address bar
  drawnWidth = document.body.clientWidth;
});
byId("choice").addEventListener("submit", (event) => event.preventDefault());
drawAll();
fillSelect("pair", data.models.length > 1 ? listPairs() : []);
fillSelect("mark", [["reference", "the closest reference"], ...data.models.map((name, model) => [model, name])]);
document.querySelectorAll(".of_pairs").forEach((label) => { label.hidden = data.models.length < 2; });
if (data.models.length < 2) Object.assign(state, { sort: "model 0", descending: false });
byId("search").addEventListener("input", showTable);
// Not for the search field, whose change event comes with the click that leaves it: the row clicked would be gone.
byId("browse").querySelectorAll("select").forEach((select) => select.addEventListener("change", showTable));
byId("browse").addEventListener("submit", (event) => event.preventDefault());
byId("choice").addEventListener("change", showTable);
byId("more").addEventListener("click", () => { state.all = true; showTable(); });
state.open.add((chooseDialogues()[0] || {}).id);
showTable();
