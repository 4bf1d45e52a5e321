"use strict";
// Groups of equal and near codes: keep the best, tick what goes, take the list of ids away.

const GROUPS = 20;
const TICKED_KEY = "hashray-ticked";
const ticked = new Set(JSON.parse(sessionStorage.getItem(TICKED_KEY) ?? "[]"));
let groups = [];
let groupsTotal = null;
let groupsController = null;

/** Show the groups from the first; they stay when the view is left and entered again. */
async function openDuplicates() {
  document.title = "Duplicates · hashray";
  drawBasket();
  if (groupsTotal === null) await loadGroups(true);
}

async function loadGroups(first) {
  if (first) {
    groupsController?.abort();
    groupsController = new AbortController();
    groups = [];
    groupsTotal = null;
    $("groups").replaceChildren(...Array.from({ length: 3 }, () => h("div", { cls: "group skeleton", "aria-hidden": "true" })));
  }
  $("duplicates-state").replaceChildren();
  $("more-groups").disabled = true;
  $("more-groups").hidden ||= first;
  $("groups-note").textContent = first ? "" : "Loading…";
  const parameters = new URLSearchParams({ offset: groups.length, limit: GROUPS });
  if ($("kind").value) parameters.set("kind", $("kind").value);
  try {
    const answer = await requestJson(`duplicates?${parameters}`, { signal: groupsController.signal,
      waiting: ({ text }) => { if (text) $("groups-note").textContent = `${text}. Trying again…`; } });
    if (first) $("groups").replaceChildren();
    groupsTotal = answer.total;
    groups = [...groups, ...answer.groups];
    $("groups").append(...answer.groups.map(drawGroup));
    drawGroupsTail(answer);
  } catch (error) {
    if (error.name === "AbortError") return;
    if (first) $("groups").replaceChildren();
    $("groups-note").textContent = "";
    $("more-groups").disabled = false;
    $("duplicates-state").replaceChildren(errorBox(error, () => loadGroups(first)));
  }
}

function drawGroupsTail({ total, within }) {
  const lead = total ? `${plural(total, "group", "groups")} of rows within ${plural(within, "bit", "bits")} of each other. Tick the rows to delete.` : "";
  $("duplicates-lead").textContent = lead;
  const all = groups.length >= total;
  $("more-groups").hidden = all;
  $("more-groups").disabled = false;
  $("tick-all").disabled = !total;
  $("groups-note").textContent = total ? (all ? "That is all." : `${number(groups.length)} of ${number(total)} shown`) : "";
  if (!total) {
    $("duplicates-state").replaceChildren(h("div", { cls: "message" }, h("h3", {}, "No duplicates"),
      h("p", {}, "The report names no group of this kind.")));
  }
  announce(`${number(groups.length)} of ${plural(total, "group", "groups")} shown`);
}

function drawGroup(group) {
  const members = h("ul", { cls: "grid small" }, group.members.map((member) => drawMember(group, member)));
  const left = group.rows - group.members.length;
  const title = `group-${group.group}`;
  return h("section", { cls: "group", "aria-labelledby": title },
    h("div", { cls: "group-head" },
      h("h2", { id: title }, `Group ${group.group + 1}`),
      h("p", {}, `${plural(group.rows, "row", "rows")}, ${group.kind === "exact" ? "equal codes" : "near codes"}`),
      h("button", { type: "button", cls: "quiet", "aria-label": `Keep the best of group ${group.group + 1}`, onclick: () => keepBest([group]) }, "Keep the best"),
      h("button", { type: "button", cls: "quiet", "aria-label": `Keep all of group ${group.group + 1}`, onclick: () => tick(group.members, false) }, "Keep all")),
    h("p", { cls: "all-go", hidden: true }, "Every row of this group is ticked: none stays."),
    members,
    left > 0 ? h("p", { cls: "hint" }, `${plural(left, "more row is", "more rows are")} in the tables of the report only.`) : null);
}

function drawMember(group, member) {
  const box = h("input", { type: "checkbox", "data-id": member.id, "aria-label": `Delete ${member.id}`, onchange: () => tick([member], box.checked) });
  box.checked = ticked.has(member.id);
  return h("li", { cls: "card member" },
    h("label", { cls: "picture" }, picture(member.id), box, h("span", { cls: "goes", "aria-hidden": "true" }, "delete")),
    h("div", { cls: "facts" },
      h("p", { cls: "distance" }, member.keep ? "stays" : member.distance === 0 ? "equal code" : plural(member.distance, "bit", "bits")),
      member.keep ? h("span", { cls: "badge best" }, "best") : null),
    h("p", { cls: "id", title: member.id }, member.id),
    h("p", { cls: "links" },
      h("a", { href: addressOf({ ...DEFAULTS, id: member.id }), "data-view": "search", "aria-label": `Search by ${member.id}` }, "Search"),
      originalLink(member.id)));
}

/** Tick or untick rows, and write what follows from it. */
function tick(members, on) {
  for (const { id } of members) {
    if (on) ticked.add(id);
    else ticked.delete(id);
  }
  sessionStorage.setItem(TICKED_KEY, JSON.stringify([...ticked]));
  drawBasket();
}

/** Tick all rows of the groups but their best. */
function keepBest(some) {
  for (const { members } of some) {
    for (const { id, keep } of members) {
      if (keep) ticked.delete(id);
      else ticked.add(id);
    }
  }
  tick([], true);
}

function drawBasket() {
  for (const box of $("groups").querySelectorAll("input[type=checkbox]")) box.checked = ticked.has(box.dataset.id);
  const sections = [...$("groups").querySelectorAll(".group:not(.skeleton)")];
  sections.forEach((section, position) => {
    const group = groups[position];
    section.querySelector(".all-go").hidden = !group.members.every(({ id }) => ticked.has(id)) || group.rows > group.members.length;
  });
  $("basket").hidden = ticked.size === 0;
  const text = `${plural(ticked.size, "row", "rows")} to delete`;
  if ($("basket-count").textContent === text) return;
  $("basket-count").textContent = text;
  $("basket-hint").replaceChildren("Then run ", h("code", {}, `hashray index delete INDEX --ids ${LIST_NAME}`));
  if (groupsTotal !== null) announce(text);
}

const LIST_NAME = "delete-ids.txt";

/** Save the ticked ids, one a line, as `hashray index delete INDEX --ids FILE` reads them. */
function exportIds() {
  const text = [...ticked].sort().map((id) => `${id}\n`).join("");
  saveAs(URL.createObjectURL(new Blob([text], { type: "text/plain" })), LIST_NAME);
  announce(`${plural(ticked.size, "id", "ids")} saved in ${LIST_NAME}`);
}
