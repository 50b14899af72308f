// The script of page.html, which includes it: pictures are enlarged, regions say what they are, cards sorted and chosen.

const box = document.createElement("dialog");  // closes on Escape by itself and gives the focus back
box.innerHTML = '<button type="button" aria-label="Close">&times;</button><div><img alt=""></div><p></p>';
document.body.append(box);
box.onclick = event => event.target.closest("path") || box.close();
box.onclose = () => light();

let current;
function enlarge(panel) {
  current = panel;
  const small = panel.querySelector("img"), large = box.querySelector("img");
  large.src = small.src;
  large.alt = box.querySelector("p").textContent = small.alt;
  large.className = small.naturalWidth < 512 ? "pixel" : "";
  box.querySelector("svg")?.remove();
  const regions = panel.querySelector("svg")?.cloneNode(true);
  if (regions) {
    regions.removeAttribute("aria-hidden");
    for (const path of regions.children) path.role = "img", path.tabIndex = 0;
    large.after(regions);
  }
  light();
  if (!box.open) box.showModal();
}
box.onkeydown = event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  const panels = [...document.querySelectorAll(".card:not([hidden]) .panel")];
  const next = step && panels[panels.indexOf(current) + step];
  if (next) enlarge(next);
};

const tip = document.createElement("div");
tip.className = "tip";
tip.ariaHidden = true;  // a screen reader reads the region's own label
function light(path) {  // a region and its partners in the other pictures of the card; without a region, none
  for (const lit of document.querySelectorAll(".lit")) lit.classList.remove("lit");
  tip.remove();
  if (!path) return;
  const {name, partner} = path.dataset, around = path.closest(".card, dialog");
  for (const other of around.querySelectorAll("path")) {
    const related = partner && other.dataset.name === partner || name && other.dataset.partner === name;
    other.classList.toggle("lit", other === path || related);
  }
  tip.textContent = path.getAttribute("aria-label");
  around.append(tip);
  const {left, top, width} = path.getBoundingClientRect(), room = innerWidth - tip.offsetWidth - 8;
  tip.style.left = `${Math.max(8, Math.min(room, left + width / 2 - tip.offsetWidth / 2))}px`;
  tip.style.top = `${Math.max(8, top - tip.offsetHeight - 8)}px`;
}
for (const kind of ["pointerover", "focusin"]) {
  document.addEventListener(kind, event => light(event.target.closest("path")));
}

for (const gallery of document.querySelectorAll(".gallery")) {
  const cards = [...gallery.querySelectorAll(".card")];
  const value = (card, key) => JSON.parse(card.dataset.values)[key] ?? null;
  const chosen = {group: "", tag: ""};
  let order = "";
  gallery.querySelector(".controls").hidden = false;
  gallery.onclick = event => {
    const panel = event.target.closest(".panel"), button = event.target.closest("button");
    if (panel) return enlarge(panel);
    if (!button) return;
    const {sort} = button.dataset, kind = ["group", "tag", "sort"].find(name => name in button.dataset);
    for (const other of gallery.querySelectorAll(`button[data-${kind}]`)) {
      other.setAttribute("aria-pressed", other === button);
      if (other !== button) delete other.dataset.order;
    }
    if (kind !== "sort") {
      chosen[kind] = button.dataset[kind];
      for (const card of cards) {
        const {group, tags} = card.dataset;
        const other = chosen.group && chosen.group !== group;
        card.hidden = other || chosen.tag && !JSON.parse(tags).includes(chosen.tag);
      }
    } else {
      button.dataset.order = button.dataset.order === "down" ? "up" : "down";  // largest first
      const sign = button.dataset.order === "up" ? 1 : -1;
      order = `, by ${sort}, ${sign > 0 ? "ascending" : "descending"}`;
      cards.sort((a, b) => {
        const x = value(a, sort), y = value(b, sort);  // a missing value goes last either way
        return x === null || y === null ? (x === null) - (y === null) : sign * (x - y);
      });
      gallery.querySelector(".cards").append(...cards);
    }
    gallery.querySelector("[role=status]").textContent = `${cards.filter(c => !c.hidden).length} shown${order}`;
  };
}
