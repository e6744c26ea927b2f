// What the report page draws from its data: tables that sort, maps that tell their names
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const main = document.getElementById("main");

// Text is only ever set as text: names may hold anything.
function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "on") for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
    else if (key === "style") Object.assign(node.style, value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((one) => one !== null && one !== undefined));
  return node;
}
const percent = (value) => (value === null || value === undefined ? "–" : (100 * value).toFixed(1));
const number = (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en"));

function section(id, title, ...children) {
  const heading = el("h2", { id: `${id}-title` }, title);
  main.append(el("section", { id, "aria-labelledby": heading.id }, heading, ...children));
  document.getElementById("contents").append(el("li", {}, el("a", { href: `#${id}` }, title)));
}

const scroller = (label, child) =>
  el("div", { class: "scroll", role: "region", tabindex: 0, "aria-label": label }, child);

function bar(value) {
  if (value === null || value === undefined) return "–";
  const fill = el("i", { style: { width: `${Math.min(100, 100 * value)}%` } });
  return el("span", { class: "bar" }, percent(value), el("span", { "aria-hidden": "true" }, fill));
}

// A table whose columns sort: {title, key, show(row)}; the first one names the row.
function sorted(label, columns, rows, start, rowClass = () => null) {
  const body = el("tbody");
  const made = rows.map((row) => ({
    row,
    node: el("tr", { class: rowClass(row) }, columns.map((column, i) => {
      const shown = column.show ? column.show(row) : number(row[column.key]);
      return i ? el("td", { class: column.text ? "name" : null }, shown)
        : el("th", { scope: "row", class: "name" }, shown);
    })),
  }));
  let key = null, down = true;
  const heads = columns.map((column) => {
    const act = () => sort(column.key, key === column.key ? !down : !column.text);
    const button = el("button", { type: "button", on: { click: act }, title: column.what }, column.title);
    return el("th", { scope: "col", class: column.text ? "name" : null }, button);
  });
  function sort(by, falling) {
    [key, down] = [by, falling];
    const compare = (a, b) => {
      const [x, y] = [a.row[by], b.row[by]];
      if (x === null || y === null) return (x === null) - (y === null); // what has no figure is last
      const order = typeof x === "string" ? x.localeCompare(y) : x - y;
      return down ? -order : order;
    };
    made.sort(compare);
    body.append(...made.map((one) => one.node));
    heads.forEach((head, i) => {
      if (columns[i].key === by) head.setAttribute("aria-sort", down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
  }
  sort(...start);
  const table = el("table", {}, el("caption", { class: "hidden" }, label),
    el("thead", {}, el("tr", {}, heads)), body);
  return { node: scroller(label, table), made };
}

function figures() {
  const panoptic = data.tasks.includes("panoptic");
  const key = panoptic ? "pq" : data.tasks.includes("semantic") ? "miou" : "ap";
  const what = { pq: "PQ", miou: "mIoU", ap: "AP" };
  const first = data.groups.filter((g) => ["all", "seen", "unseen", "harmonic"].includes(g.name) && g[key] !== undefined);
  const cards = first.map((group) => {
    const range = group.ranges[key];
    const said = range ? `95%: ${percent(range[0])} to ${percent(range[1])}` : "no interval";
    return el("div", { class: `card ${group.name}` }, `${group.name} ${what[key]}`, el("b", {}, percent(group[key])),
      el("span", { class: "range" }, said),
      el("div", { class: "axis", "aria-hidden": "true" },
        range ? el("i", { style: { left: `${100 * range[0]}%`, width: `${100 * (range[1] - range[0])}%` } }) : null,
        el("u", { style: { left: `calc(${100 * group[key]}% - 1px)` } })));
  });
  const columns = [["PQ", "pq"], ["SQ", "sq"], ["RQ", "rq"], ["mIoU", "miou"], ["fwIoU", "fwiou"], ["pACC", "pacc"],
    ["AP", "ap"], ["AP50", "ap50"]].filter(([, k]) => data.groups.some((g) => g[k] !== undefined));
  const cell = (group, k) => {
    const range = group.ranges[k];
    return el("td", {}, percent(group[k]), range ? el("span", { class: "note" }, ` [${percent(range[0])}, ${percent(range[1])}]`) : null);
  };
  const table = el("table", {}, el("caption", { class: "hidden" }, "Figures by group of classes, in percent"),
    el("thead", {}, el("tr", {}, el("th", { scope: "col", class: "name" }, "classes"),
      columns.map(([title]) => el("th", { scope: "col" }, title)), el("th", { scope: "col" }, "number"))),
    el("tbody", {}, data.groups.map((group) => el("tr", {}, el("th", { scope: "row", class: "name" }, group.name),
      columns.map(([, k]) => cell(group, k)), el("td", {}, number(group.n))))));
  section("figures", "Figures", el("p", { class: "note" }, `In percent, over ${number(data.images)} images. ` +
    "Harmonic: the harmonic mean of seen and unseen."), el("div", { class: "cards" }, cards),
    el("h3", {}, "All figures"), scroller("Figures", table));
}

function classes() {
  const has = (key) => data.classes.some((row) => row[key] !== null && row[key] !== undefined);
  const columns = [
    ...[["PQ", "pq"], ["IoU", "iou"], ["AP", "ap"]].filter(([, k]) => has(k)).map(([title, key]) =>
      ({ title, key, show: (r) => bar(r[key]) })),
    ...[["SQ", "sq"], ["RQ", "rq"]].filter(([, k]) => has(k)).map(([title, key]) =>
      ({ title, key, show: (r) => percent(r[key]) })),
    ...Object.keys(data.meaning || {}).filter((k) => k !== "ignored").map((key) => ({ title: key, key, what: data.meaning[key] })),
  ];
  const first = has("pq") ? "pq" : has("iou") ? "iou" : "ap";
  section("classes", "Classes", ...classTable("", data.classes, columns, [first, false], "A heading sorts by its column. " +
    "– : the class does not occur, so it is in no mean. " +
    (data.meaning ? "The words on the right are told under “What went wrong”." : "")));
}

// A table of classes that can be searched; columns: those behind name, split and kind.
function classTable(id, classes, columns, start, note) {
  const divided = classes.some((row) => row.seen !== null);
  const rows = classes.map((row) => ({ ...row, group: row.seen === null ? "" : row.seen ? "seen" : "unseen",
    kind: row.thing ? "thing" : "stuff" }));
  const all = [
    { title: "class", key: "name", text: true, show: (r) => el("span", { class: "name" }, r.name) },
    divided && { title: "seen", key: "group", text: true, show: (r) => el("span", { class: `tag ${r.group}` }, r.group) },
    { title: "kind", key: "kind", text: true, show: (r) => r.kind },
    ...columns,
  ].filter(Boolean);
  const table = sorted("Classes", all, rows, start, (r) => (r.seen === false ? "of-unseen" : null));
  const count = el("span", { role: "status", id: `shown${id}` });
  const search = el("input", { type: "search", id: `search${id}`, placeholder: "name of a class" });
  const choice = (id, values) => el("select", { id }, values.map((v) => el("option", { value: v }, v)));
  const split = choice(`split${id}`, ["all", "seen", "unseen"]), kind = choice(`kind${id}`, ["all", "thing", "stuff"]);
  const filter = () => {
    const text = search.value.trim().toLowerCase();
    let shown = 0;
    for (const { row, node } of table.made) {
      const fits = row.name.toLowerCase().includes(text) && ["all", row.group].includes(split.value) &&
        ["all", row.kind].includes(kind.value);
      node.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown} of ${rows.length} classes`;
  };
  for (const one of [search, split, kind]) one.addEventListener("input", filter);
  filter();
  return [el("div", { class: "tools" }, el("label", { for: `search${id}` }, "Search"), search,
    divided ? el("label", {}, "Split", split) : null, el("label", {}, "Kind", kind), count),
    el("p", { class: "note" }, note), table.node];
}

// Comparisons: rows of figures, then each method against the first one.
const GROUPS = ["all", "seen", "unseen", "harmonic"];
const signed = (value) => `${value < 0 ? "−" : "+"}${(100 * Math.abs(value)).toFixed(1)}`;

function ranged(one, show) {
  const sure = show === signed && (one?.low > 0 || one?.high < 0); // a difference beyond chance
  return one ? [el(sure ? "b" : "span", {}, show(one.value)), el("span", { class: "note" }, ` [${show(one.low)}, ${show(one.high)}]`)] : "–";
}

function meanTable(label, rows, show) {
  const columns = [["pq", "PQ"], ["miou", "mIoU"]].flatMap(([key, title]) =>
    GROUPS.filter((g) => rows.some((row) => row[key][g])).map((g) => [key, g, g === "all" ? title : `${g} ${title}`]));
  return scroller(label, el("table", {}, el("caption", { class: "hidden" }, label),
    el("thead", {}, el("tr", {}, el("th", { scope: "col", class: "name" }, "method"),
      columns.map(([, , title]) => el("th", { scope: "col" }, title)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, el("th", { scope: "row", class: "name" }, row.label),
      columns.map(([key, g]) => el("td", {}, ranged(row[key][g], show))))))));
}

function compared() {
  section("figures", "Figures", el("p", { class: "note" }, "In percent, with 95% intervals."),
    meanTable("Figures of each", data.rows, percent), data.differences.length ?
      [el("h3", {}, `Minus ${data.differences[0].minus}`), meanTable("Differences", data.differences, signed)] : null);
  data.differences.forEach((pair, i) => {
    const rows = pair.classes.map((one) => ({ ...one, gap: one.difference && one.difference.value }));
    const columns = [
      { title: pair.minus, key: "theirs", show: (r) => bar(r.theirs) },
      { title: pair.label, key: "ours", show: (r) => bar(r.ours) },
      { title: "difference", key: "gap", show: (r) => ranged(r.difference, signed) },
    ];
    const shown = pair.images.map((one) => ({ one, image: (data.shown || {})[one.image] }));
    const row = ({ one }) => el("tr", {}, el("th", { scope: "row", class: "name" }, one.image),
      [one.theirs, one.ours].map((v) => el("td", {}, percent(v))), el("td", {}, signed(one.ours - one.theirs)));
    const title = `${pair.label} against ${pair.minus}`;
    section(`pair${i}`, title, rows.length ? [el("h3", {}, "Classes"),
      ...classTable(String(i), rows, columns, ["gap", false], "Those that lost most first; bold: the interval is " +
        "without 0, as it also is for one of 20 classes that do not differ.")] : null,
    shown.length ? [el("h3", {}, "The images that differ most"), el("p", { class: "note" },
      "By the mean over the classes in it."), gallery(shown.filter(({ image }) => image).map(({ one, image }) => ({ image,
      figure: `${percent(one.theirs)} → ${percent(one.ours)}`, views: [["truth", image.truth],
        ...[pair.minus, pair.label].map((label) => [label, image.found[label]])].filter(([, side]) => side) }))),
    el("h3", {}, "Their figures"), scroller(`Images of ${title}`, el("table", {}, el("caption", { class: "hidden" }, "Images that differ most"),
      el("thead", {}, el("tr", {}, ["image", pair.minus, pair.label, "difference"].map((h, n) =>
        el("th", { scope: "col", class: n ? null : "name" }, h)))), el("tbody", {}, shown.map(row))))] : null);
  });
}

function wrong() {
  const what = data.regions ? "Without segments, all that is of one class in an image counts as one. " : "";
  const parts = data.outcomes.filter((one) => !one.predicted);
  const total = parts.reduce((sum, one) => sum + one.count, 0);
  const share = (one) => (total ? one.count / total : 0);
  const stack = el("div", { class: "stack", role: "img", "aria-label": parts.map((one) =>
    `${one.name} ${percent(share(one))}%`).join(", ") }, parts.map((one) =>
    el("i", { class: `k-${one.name}`, title: one.name, style: { width: `${100 * share(one)}%` } })));
  const divided = data.classes.some((row) => row.seen !== null);
  const heads = ["what", "segments", "share", ...(divided ? ["seen", "unseen"] : []), "meaning"];
  const table = el("table", {}, el("caption", { class: "hidden" }, "What became of segments"),
    el("thead", {}, el("tr", {}, heads.map((h) => el("th", { scope: "col", class: ["what", "meaning"].includes(h) ? "name" : null }, h)))),
    el("tbody", {}, data.outcomes.map((one) => el("tr", {},
      el("th", { scope: "row", class: "name" }, el("span", { class: `swatch k-${one.name}`, "aria-hidden": "true" }), one.name),
      el("td", {}, number(one.count)), el("td", {}, one.predicted ? "–" : percent(share(one))),
      divided ? [el("td", {}, number(one.seen)), el("td", {}, number(one.unseen))] : null,
      el("td", { class: "name", style: { whiteSpace: "normal", minWidth: "16rem" } }, data.meaning[one.name])))));
  section("wrong", "What went wrong", el("p", { class: "note" }, `${what}Of ${number(total)} true segments, ` +
    "crowds left out; of several that hold, the first counts. Hallucinated segments are predicted ones."),
    stack, el("div", { style: { height: ".75rem" } }), scroller("What became of segments", table));

  const sizes = el("table", {}, el("caption", { class: "hidden" }, "PQ by size of segments"),
    el("thead", {}, el("tr", {}, ["share of the image", "PQ", "found", "false", "missed"].map((h, i) =>
      el("th", { scope: "col", class: i ? null : "name" }, h)))),
    el("tbody", {}, data.sizes.map((row) => el("tr", {}, el("th", { scope: "row", class: "name" }, row.label),
      el("td", {}, bar(row.pq)), [row.tp, row.fp, row.fn].map((n) => el("td", {}, number(n)))))));
  section("sizes", "PQ by size", el("p", { class: "note" }, "All segments of a size at once, whatever their class: found and " +
    "missed ones by the true segment's size, false ones by their own. It is not the mean over classes."), scroller("PQ by size", sizes));
}

function confusion() {
  const { pairs, grid, cells, matched, wrong: bad, left } = data.confusion;
  const name = (c) => el("span", { class: "name" }, data.names[c]);
  const said = `${number(matched)} true segments have a predicted one with an IoU above 0.5; ` +
    `${number(bad)} of them have another class.`;
  if (!pairs.length) return section("confusion", "Confusion", el("p", {}, said));
  const sums = cells.map((row) => Math.max(1, row.reduce((a, b) => a + b, 0)));
  const matrix = el("table", {}, el("caption", { class: "hidden" }, "Confusion matrix: true classes in rows, predicted in columns"),
    el("thead", {}, el("tr", {}, el("th", { scope: "col", class: "name" }, "true \\ predicted"),
      grid.map((c) => el("th", { scope: "col", class: "turned" }, el("span", { class: "name" }, data.names[c]))))),
    el("tbody", {}, cells.map((row, i) => el("tr", {}, el("th", { scope: "row", class: "name" }, name(grid[i])),
      row.map((n, j) => el("td", { class: i === j ? "heat own" : "heat",
        style: { background: `rgba(var(--heat), ${0.55 * n / sums[i]})` } }, n ? number(n) : ""))))));
  const rows = pairs.map(([t, p, n, all]) => ({ t: data.names[t], p: data.names[p], n, share: n / all }));
  const table = sorted("Confused classes", [
    { title: "true class", key: "t", text: true, show: (r) => el("span", { class: "name" }, r.t) },
    { title: "named as", key: "p", text: true, show: (r) => el("span", { class: "name" }, r.p) },
    { title: "segments", key: "n" },
    { title: "of the matched", key: "share", show: (r) => bar(r.share) },
  ], rows, ["n", true]);
  section("confusion", "Confusion", el("p", { class: "note" }, said),
    el("h3", {}, `The ${grid.length} classes that are confused most`), scroller("Confusion matrix", matrix),
    el("h3", {}, "Pairs"), left ? el("p", { class: "note" }, `${number(left)} rarer pairs are not listed.`) : null, table.node);
}

// Runs of (segment, length), row by row -> the segment of every pixel.
function unpacked(runs, size) {
  const map = new Uint16Array(size);
  for (let i = 0, at = 0; i < runs.length; i += 2) map.fill(runs[i], at, (at += runs[i + 1]));
  return map;
}

function colour(label, nth) { // one for each class, the same on the whole page
  const known = data.colours[label];
  if (known) {
    const mixed = [0, 0.4, -0.35, 0.65][nth % 4]; // towards white, or towards black
    return known.map((n) => Math.round(mixed < 0 ? n * (1 + mixed) : n + (255 - n) * mixed));
  }
  const hue = (label * 137.508) % 360, light = [0.5, 0.62, 0.38, 0.7][(nth + Math.floor(label / 7)) % 4];
  const part = (n) => {
    const k = (n + hue / 30) % 12;
    return Math.round(255 * (light - 0.75 * Math.min(light, 1 - light) * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  };
  return [part(0), part(8), part(4)];
}

function view(title, image, side, say) {
  const { runs, segments, size: [height, width] } = side;
  const map = unpacked(runs, height * width), canvas = el("canvas", { width, height, role: "img" });
  const names = segments.map(([label]) => (label < 0 ? "not listed" : data.names[label]));
  const listed = [...new Set(names)].slice(0, 12).join(", ");
  canvas.setAttribute("aria-label", `${title} of ${image.name}: ${segments.length} segments: ${listed}`);
  const times = new Map(), tints = segments.map(([label]) => {
    times.set(label, (times.get(label) ?? -1) + 1);
    return label < 0 ? [128, 128, 128] : colour(label, times.get(label));
  });
  const context = canvas.getContext("2d");
  let lit = 0;
  function paint(chosen) {
    const pixels = context.createImageData(width, height), out = pixels.data;
    for (let i = 0; i < map.length; i++) {
      const id = map[i], x = i % width;
      if (!id) continue;
      const edge = (x + 1 < width && map[i + 1] !== id) || (i + width < map.length && map[i + width] !== id) ||
        (x && map[i - 1] !== id) || (i >= width && map[i - width] !== id);
      const [r, g, b] = tints[id - 1];
      const strong = image.photo ? (data.things[segments[id - 1][0]] ? 0.5 : 0.34) : 0.85;
      out.set([r, g, b, 255 * (edge ? 0.95 : chosen ? (chosen === id ? 0.8 : strong / 3) : strong)], 4 * i);
    }
    context.putImageData(pixels, 0, 0);
  }
  function tell(id) {
    if (id === lit) return;
    lit = id;
    paint(id);
    if (!id) return say("");
    const [label, kind, score, iou] = segments[id - 1];
    const more = [kind, score === null || score === undefined ? "" : `score ${score.toFixed(2)}`,
      iou === null || iou === undefined ? "" : `best IoU ${iou.toFixed(2)}`].filter(Boolean).join(", ");
    say(`${title}: ${label < 0 ? "not listed" : data.names[label]} (${more})`);
  }
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const x = Math.floor((event.clientX - box.left) * width / box.width);
    const y = Math.floor((event.clientY - box.top) * height / box.height);
    tell(x < 0 || y < 0 || x >= width || y >= height ? 0 : map[y * width + x]);
  });
  canvas.addEventListener("pointerleave", () => tell(0));
  paint(0);
  const there = new Set(map);
  const buttons = segments.map(([, kind], i) => there.has(i + 1) ? el("li", {}, el("button", { type: "button",
    on: { focus: () => tell(i + 1), click: () => tell(i + 1), pointerenter: () => tell(i + 1), blur: () => tell(0) } },
    el("span", { class: `swatch`, "aria-hidden": "true", style: { background: `rgb(${tints[i]})` } }),
    el("span", { class: "name" }, names[i]), `, ${kind}`)) : null);
  const photo = image.photo ? el("img", { src: image.photo, alt: "" }) : null;
  return {
    node: el("div", { class: "view" }, el("span", {}, title), el("div", { class: "layers" }, photo, canvas)),
    list: el("div", {}, el("h4", { class: "note" }, title), el("ul", { class: "segments" }, buttons)),
  };
}

// Images with what is to be seen of each side by side: [{image, views: [[title, side]], figure}].
function gallery(images) {
  return el("div", { class: "gallery" }, images.map(({ image, views: sides, figure }) => {
    const said = el("p", { class: "said", role: "status" });
    const say = (text) => { said.textContent = text || "Point at a segment to see its name."; };
    say("");
    const views = sides.map(([title, side]) => view(title, image, side, say));
    return el("figure", {}, el("figcaption", {}, el("span", { class: "name" }, image.name),
      el("b", {}, figure)), el("div", { class: "pair" }, views.map((one) => one.node)), said,
      el("details", {}, el("summary", {}, "Segments as a list"), views.map((one) => one.list)));
  }));
}

function images() {
  if (!data.worst.length) return;
  const worst = data.worst.length, best = data.best.length;
  const shown = (image) => ({ image, figure: `PQ ${percent(image.score)}`,
    views: [["truth", image.truth], ["prediction", image.found]] });
  section("images", "Images", el("p", { class: "note" }, "By PQ over all segments of the image at once. " +
    "Colours stand for classes, the same on both sides and in every image."),
    el("h3", {}, `The worst ${worst}`), gallery(data.worst.map(shown)),
    best ? [el("h3", {}, `The best ${best}`), gallery(data.best.map(shown))] : null);
}

function curve({ name, steps, values }) {
  const [w, h, pad] = [220, 80, 4], low = Math.min(...values), high = Math.max(...values);
  const first = steps[0], span = steps[steps.length - 1] - first || 1;
  const points = values.map((v, i) => `${(pad + (w - 2 * pad) * (steps[i] - first) / span).toFixed(1)},` +
    `${(h - pad - (h - 2 * pad) * (v - low) / (high - low || 1)).toFixed(1)}`).join(" ");
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${w} ${h}`);
  svg.setAttribute("role", "img");
  const last = values[values.length - 1];
  svg.setAttribute("aria-label", `${name}: from ${values[0]} at step ${first} to ${last} at step ` +
    `${steps[steps.length - 1]}, lowest ${low}, highest ${high}`);
  const line = document.createElementNS(svg.namespaceURI, "polyline");
  line.setAttribute("points", points);
  svg.append(line);
  return el("figure", {}, el("figcaption", {}, el("span", { class: "name" }, name), el("b", {}, String(last))), svg,
    el("span", { class: "note" }, `${low} to ${high}, ${number(steps[steps.length - 1])} steps`));
}

function training() {
  if (!data.training.length) return;
  section("training", "Training", el("p", { class: "note" }, "Losses and, where it was scored, dev over the steps; each " +
    "curve has its own scale, its last value stands above."),
    data.training.map((stage) => [el("h3", {}, stage.title), el("div", { class: "curves" }, stage.curves.map(curve)),
      stage.preview ? [el("p", { class: "note" }, `The newest preview, ${stage.previewName}: image, truth, prediction.`),
        el("img", { class: "preview", src: stage.preview, alt: `Preview of ${stage.title}: image, truth and prediction in rows` })] : null]));
}

document.title = `${data.title} – concat`;
document.getElementById("title").textContent = data.title;
section("protocol", "How it was scored", el("ul", {}, data.facts.map((fact) => el("li", { class: "name" }, fact))));
if (data.differences) compared();
else {
  figures();
  if (data.classes.length) classes();
  if (data.outcomes) {
    wrong();
    confusion();
    images();
  }
  training();
}
