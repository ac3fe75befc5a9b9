"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const kindOf = new Map(data.kinds.map((kind) => [kind.name, kind]));
  const hidden = new Set(); // classes of method
  let selected = null; // a row of data.rows
  let sorting = { key: null, down: false };

  // All text goes through textContent: a method's name is whatever the user called it.
  function element(name, attributes = {}, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }
  function svg(name, attributes = {}, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }

  // Markers, named as in matplotlib, so that pictures and page agree.
  function polygon(corners, radius, turn = 0, inner = null) {
    const count = inner === null ? corners : 2 * corners;
    const points = Array.from({ length: count }, (_, i) => {
      const angle = (2 * Math.PI * i) / count - Math.PI / 2 + turn;
      const r = inner !== null && i % 2 ? inner * radius : radius;
      return `${(r * Math.cos(angle)).toFixed(2)},${(r * Math.sin(angle)).toFixed(2)}`;
    });
    return `M${points.join("L")}Z`;
  }
  function cross(r) {
    const a = 0.42 * r, b = 1.02 * r;
    return `M0,${-a}L${b - a},${-b}L${b},${a - b}L${a},0L${b},${b - a}L${b - a},${b}L0,${a}L${a - b},${b}L${-b},${b - a}L${-a},0L${-b},${a - b}L${a - b},${-b}Z`;
  }
  const MARKERS = {
    o: (r) => `M${-r},0A${r},${r} 0 1 0 ${r},0A${r},${r} 0 1 0 ${-r},0Z`,
    s: (r) => polygon(4, 1.25 * r, Math.PI / 4),
    D: (r) => polygon(4, 1.25 * r),
    "^": (r) => polygon(3, 1.3 * r),
    v: (r) => polygon(3, 1.3 * r, Math.PI),
    p: (r) => polygon(5, 1.15 * r),
    h: (r) => polygon(6, 1.1 * r),
    "*": (r) => polygon(5, 1.6 * r, 0, 0.42),
    X: cross,
  };
  function shape(kindName, radius) {
    const kind = kindOf.get(kindName);
    const path = svg("path", { d: MARKERS[kind.marker](radius), class: "shape" });
    path.style.fill = kind.name === "teacher" ? "var(--ink)" : kind.colour;
    return path;
  }
  const legendMark = (kind) => svg("svg", { class: "mark", viewBox: "-8 -8 16 16", "aria-hidden": "true" }, shape(kind, 5.5));

  const visible = () => data.rows.filter((row) => !hidden.has(row.kind));

  // ---- plot
  const plot = $("plot"), canvas = plot.querySelector("svg"), tip = $("tip");
  const axis = (direction) => data.axes[direction].find((one) => one.key === $(`axis-${direction}`).value);

  function ticks(low, high, log, most) {
    if (log) {
      const found = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
        for (const step of high / low > 5 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 8]) found.push(step * 10 ** power);
      }
      return found.filter((value) => value >= low && value <= high).map((value) => Number(value.toPrecision(3)));
    }
    const rough = (high - low) / most, unit = 10 ** Math.floor(Math.log10(rough));
    const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough);
    const found = [];
    for (let value = Math.ceil(low / step); value * step <= high + 1e-9; value++) found.push(Number((value * step).toPrecision(10)));
    return found;
  }

  // The rows that no other beats in both, cheapest first: pareto_front in results.py.
  function paretoFront(rows, x, y) {
    const cost = (row) => (x.more ? -1 : 1) * row.values[x.key];
    const front = [];
    for (const row of [...rows].sort((a, b) => cost(a) - cost(b) || b.values[y.key] - a.values[y.key])) {
      if (!front.length || row.values[y.key] > front.at(-1).values[y.key]) front.push(row);
    }
    return front;
  }

  function draw() {
    const x = axis("x"), y = axis("y"), log = $("log").checked;
    canvas.replaceChildren();
    tip.hidden = true;
    const rows = x && y ? visible().filter((row) => row.error === null && row.values[x.key] !== null && row.values[y.key] !== null && (!log || row.values[x.key] > 0)) : [];
    const width = plot.clientWidth, narrow = width < 600;
    const height = rows.length ? Math.round(Math.min(520, Math.max(330, 0.46 * width))) : 120;
    canvas.setAttribute("viewBox", `0 0 ${width} ${height}`);
    canvas.style.height = `${height}px`;
    if (!rows.length) {
      canvas.append(svg("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "Nothing to show: no method of these classes has both numbers."));
      return;
    }
    const box = { left: 40, right: width - 52, top: 30, bottom: height - 44 };

    const xs = rows.map((row) => row.values[x.key]);
    let [low, high] = [Math.min(...xs), Math.max(...xs)];
    if (log) {
      const span = Math.max(high / low, 2);
      [low, high] = [low / span ** 0.06, high * span ** 0.1];
    } else {
      [low, high] = [0, high * 1.08];
    }
    const along = log ? (value) => Math.log(value / low) / Math.log(high / low) : (value) => value / high;
    const px = (value) => box.left + along(value) * (box.right - box.left);

    // One broken model must not press the others into a line: it is drawn at the lower edge, with its value.
    const least = y.reference === null ? -Infinity : data.floor * y.reference;
    const ys = rows.map((row) => row.values[y.key]), good = ys.filter((value) => value >= least);
    const top = Math.max(...ys), bottom = good.length ? Math.min(...good) : top;
    const room = Math.max(0.5, 0.08 * (top - bottom)), below = ys.some((value) => value < least);
    const from = bottom - (below ? 2.2 : 1) * room, floor = below ? bottom - 1.4 * room : from, to = top + 1.2 * room;
    const py = (value) => box.bottom - ((Math.max(value, floor) - from) / (to - from)) * (box.bottom - box.top);

    for (const value of ticks(below ? bottom - 0.7 * room : from, to, false, 6)) {
      canvas.append(
        svg("line", { class: "grid", x1: box.left, x2: box.right, y1: py(value), y2: py(value) }),
        svg("text", { x: box.left - 8, y: py(value) + 4, "text-anchor": "end" }, String(value)),
      );
    }
    canvas.append(svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
    let last = -Infinity;
    for (const value of ticks(low, high, log, narrow ? 4 : 9)) {
      if (px(value) - last < 34) continue;
      last = px(value);
      canvas.append(
        svg("line", { class: "axis", x1: last, x2: last, y1: box.bottom, y2: box.bottom + 5 }),
        svg("text", { x: last, y: box.bottom + 19, "text-anchor": "middle" }, value.toLocaleString("en")),
      );
    }
    const better = x.more ? "better \u2192" : "\u2190 better";
    canvas.append(
      svg("text", { class: "title", x: 0, y: 14 }, `${y.label} (${y.unit})`),
      svg("text", { class: "title", x: box.right, y: height - 6, "text-anchor": "end" }, `${x.label} (${x.unit})\u2003${better}`),
    );
    const segments = [];
    if (y.reference !== null) {
      for (const share of [1, ...data.levels]) {
        const value = share * y.reference;
        if (value < bottom - room || value > to) continue;
        canvas.append(
          svg("line", { class: share === 1 ? "level teacher" : "level", x1: box.left, x2: box.right, y1: py(value), y2: py(value) }),
          svg("text", { x: box.right + 6, y: py(value) + 4 }, share === 1 ? "teacher" : `${Math.round(100 * share)}%`),
        );
        segments.push([box.left, py(value) - 1, box.right, py(value) + 1]);
      }
    }

    const front = paretoFront(rows, x, y);
    const corners = [];
    for (const row of front) {
      const at = [px(row.values[x.key]), py(row.values[y.key])];
      if (corners.length) corners.push([at[0], corners.at(-1)[1]]);
      corners.push(at);
    }
    corners.push([x.more ? box.left : box.right, corners.at(-1)[1]]);
    canvas.append(svg("path", { class: "front", d: `M${corners.map((at) => at.join(",")).join("L")}` }));
    for (let i = 1; i < corners.length; i++) {
      const [[ax, ay], [bx, by]] = [corners[i - 1], corners[i]];
      segments.push([Math.min(ax, bx) - 1, Math.min(ay, by) - 1, Math.max(ax, bx) + 1, Math.max(ay, by) + 1]);
    }

    const layer = svg("g");
    const points = [...rows].sort((a, b) => a.values[x.key] - b.values[x.key]).map((row) => ({
      row, x: px(row.values[x.key]), y: py(row.values[y.key]), best: front.includes(row), low: row.values[y.key] < least,
    }));
    for (const { row, x: at, low } of points) {
      const half = row.deviations[y.key];
      if (!half || low) continue;
      const value = row.values[y.key];
      layer.append(svg("line", { class: "whisker", x1: at, x2: at, y1: py(value - half), y2: py(value + half) }));
    }
    points.forEach((point, i) => layer.append(pointMark(point, x, y, i)));
    // The front on top of what it beats.
    for (const point of points) if (point.best) layer.append(point.node);
    canvas.append(layer);
    points[0].node.setAttribute("tabindex", "0");
    nameThem(points, segments, box, narrow);
    mark();
  }

  function pointMark(point, x, y, order) {
    const { row } = point;
    const label = `${row.method}, ${row.kind}: ${y.label} ${row.texts[y.key]}${y.unit}, ${x.label} ${row.texts[x.key]} ${x.unit}`;
    const node = svg(
      "g",
      { class: "point", role: "button", tabindex: "-1", "aria-label": label, "aria-pressed": "false", "data-order": order, transform: `translate(${point.x.toFixed(2)},${point.y.toFixed(2)})` },
      svg("circle", { class: "hit", r: 14 }), svg("circle", { class: "ring", r: 11 }), shape(row.kind, point.best ? 6.2 : 5),
    );
    node.row = row;
    point.node = node;
    const show = () => { showTip(point, x, y); hover(row, true); };
    const hide = () => { tip.hidden = true; hover(row, false); };
    node.addEventListener("mouseenter", show);
    node.addEventListener("mouseleave", hide);
    node.addEventListener("focus", show);
    node.addEventListener("blur", hide);
    node.addEventListener("click", () => select(row));
    node.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (step) {
        event.preventDefault();
        const next = canvas.querySelector(`.point[data-order="${order + step}"]`);
        if (!next) return;
        node.setAttribute("tabindex", "-1");
        next.setAttribute("tabindex", "0");
        next.focus();
      } else if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        select(row);
      } else if (event.key === "Escape") {
        tip.hidden = true;
      }
    });
    return node;
  }

  function showTip(point, x, y) {
    const { row } = point;
    const line = (text) => element("span", {}, text);
    tip.replaceChildren(
      element("strong", {}, row.method),
      line(row.kind),
      line(`${y.label}: ${row.texts[y.key]}%${y.key === "score" ? `, ${row.texts.retained}% of the teacher’s` : ""}`),
      line(`${x.label}: ${row.texts[x.key]} ${x.unit}`),
      line(`${row.texts.faster}× faster, ${row.texts.smaller}× smaller`),
    );
    tip.hidden = false;
    const left = point.x > plot.clientWidth / 2 ? point.x - tip.offsetWidth - 18 : point.x + 18;
    tip.style.left = `${Math.max(0, Math.min(left, plot.clientWidth - tip.offsetWidth))}px`;
    tip.style.top = `${Math.max(0, point.y - tip.offsetHeight / 2)}px`;
  }

  // As place_labels in pictures.py: the first free place near the point, the front's first, else none.
  function nameThem(points, segments, box, narrow) {
    const overlap = (a, b) => Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0])) * Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
    const taken = [...segments];
    const marks = points.map((p) => [p.x - 9, p.y - 9, p.x + 9, p.y + 9]);
    const order = points.map((_, i) => i).filter((i) => points[i].best || !narrow || points[i].low);
    order.sort((a, b) => points[b].best - points[a].best || points[a].y - points[b].y);
    for (const i of order) {
      const { row, x, y, best, low } = points[i];
      const most = narrow ? 22 : 46;
      const name = row.method.length > most ? `${row.method.slice(0, most - 1)}…` : row.method;
      const text = svg("text", { class: best ? "name best" : "name" }, low ? `${name} ${row.texts[$("axis-y").value]} ↓` : name);
      canvas.append(text);
      const w = text.getComputedTextLength(), h = 14;
      let found = null;
      search: for (const d of [11, 16, 24]) {
        for (const [right, up] of [[1, 0], [-1, 0], [-1, 1], [1, -1], [0, 1], [0, -1], [1, 1], [-1, -1]]) {
          const left = x + (right > 0 ? d : right < 0 ? -d - w : -w / 2);
          const upper = y + (up > 0 ? -d - h / 2 - 3 : up < 0 ? d - h / 2 + 3 : -h / 2);
          const spot = [left, upper, left + w, upper + h];
          const free = left >= box.left + 2 && left + w <= box.right && upper >= 18 && upper + h <= box.bottom - 2
            && ![...taken, ...marks.filter((_, j) => j !== i)].some((other) => overlap(spot, other) > 0);
          if (free) { found = spot; break search; }
        }
      }
      if (!found) { text.remove(); continue; }
      taken.push(found);
      text.setAttribute("x", found[0]);
      text.setAttribute("y", found[1] + 11);
    }
  }

  // ---- table
  const head = document.querySelector("#table thead"), body = document.querySelector("#table tbody");
  const columns = [
    { key: "method", label: "method", text: true, place: "method text" },
    { key: "kind", label: "class", text: true, place: "text" },
    { key: "front", label: "Pareto", text: true, place: "text wide-only" },
    ...data.columns,
  ];

  function buildHead() {
    const groups = [];
    for (const column of data.columns) {
      if (groups.at(-1)?.name === column.group) groups.at(-1).count++;
      else { groups.push({ name: column.group, count: 1 }); column.first = true; }
    }
    const upper = element("tr", {},
      ...columns.filter((column) => !column.group).map((column) => element("td", { class: column.place })),
      ...groups.map(({ name, count }) => element("th", { class: "group", scope: "colgroup", colspan: count }, name)));
    const lower = element("tr", {}, ...columns.map((column) => {
      const button = element("button", { type: "button" }, column.label);
      if (column.hint && column.hint !== column.label) button.title = column.hint;
      button.addEventListener("click", () => sortBy(column));
      const classes = [column.place ?? "", column.first ? "first" : ""];
      column.cell = element("th", { scope: "col", "aria-sort": "none", "data-key": column.key, class: classes.join(" ").trim() }, button);
      return column.cell;
    }));
    head.append(upper, lower);
  }

  function buildRow(row) {
    const id = `details-${data.rows.indexOf(row)}`;
    const name = element("button", { type: "button", "aria-expanded": "false", "aria-controls": id }, element("span", {}, ...breakable(row.method)));
    const line = element("tr", { class: "row" }, element("th", { scope: "row" }, name), element("td", { class: "kind-cell" }, legendMark(row.kind), element("span", {}, row.kind)));
    if (row.error !== null) {
      line.append(element("td", { class: "error", colspan: columns.length - 2 }, element("div", {}, `failed: ${row.error}`)));
    } else {
      line.append(element("td", { class: "text wide-only" }, row.front ?? ""));
      for (const column of data.columns) {
        const cell = element("td", column.first ? { class: "first" } : {}, row.texts[column.key]);
        if (row.p95[column.key] !== undefined) cell.append(element("small", { title: "95th percentile" }, row.p95[column.key]));
        line.append(cell);
      }
    }
    const details = element("tr", { class: "details", id, hidden: "" });
    name.addEventListener("click", (event) => {
      event.stopPropagation();
      const open = details.hidden;
      if (open && !details.hasChildNodes()) details.append(element("td", { colspan: columns.length }, sheet(row)));
      details.hidden = !open;
      name.setAttribute("aria-expanded", String(open));
      select(row, true);
    });
    line.addEventListener("click", () => select(row));
    line.addEventListener("mouseenter", () => hover(row, true));
    line.addEventListener("mouseleave", () => hover(row, false));
    row.line = line;
    row.details = details;
    row.button = name;
  }

  // A long chain may break after a plus.
  function breakable(text) {
    return text.split(/(?<=\+)/).flatMap((part) => [element("i", {}, part), element("wbr")]);
  }

  function sheet(row) {
    const parts = [];
    if (row.description) parts.push(element("p", { class: "wide" }, row.description));
    if (row.error !== null) parts.push(element("p", { class: "wide error" }, row.error));
    const copy = element("button", { type: "button", class: "copy", "aria-label": `Copy the command of ${row.method}` }, "Copy");
    copy.addEventListener("click", () => copyText(row.command, copy));
    parts.push(element("div", { class: "wide command" }, element("code", {}, row.command), copy));
    if (row.timings.length) parts.push(small("Latency, ms", ["batch", "length", "threads", "p50", "p95"], row.timings));
    if (row.scores.length) {
      const rows = row.scores.map((scores, i) => [row.seeds[i] ?? "–", ...scores]);
      parts.push(small("Scores, %", ["seed", ...row.metrics], rows));
    }
    if (row.front) parts.push(element("p", { class: "wide quiet" }, `On the Pareto front of ${row.front.replace(", ", " and of ")}.`));
    if (row.folder) parts.push(element("p", { class: "wide quiet" }, "Model: ", element("code", {}, row.folder)));
    return element("div", { class: "sheet" }, ...parts);
  }

  function small(caption, titles, rows) {
    const line = (cells, name, attributes) => element("tr", {}, ...cells.map((cell) => element(name, attributes, String(cell))));
    return element("table", {}, element("caption", {}, caption),
      element("thead", {}, line(titles, "th", { scope: "col" })), element("tbody", {}, ...rows.map((cells) => line(cells, "td", {}))));
  }

  async function copyText(text, button) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Without leave to use the clipboard, or in a page that is not trusted with it.
      const area = element("textarea", { readonly: "" });
      area.value = text;
      button.after(area);
      area.select();
      document.execCommand("copy");
      area.remove();
      button.focus();
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  }

  function sortBy(column) {
    // The better end first; once more, the other one.
    const down = sorting.key === column.key ? !sorting.down : !column.text && column.more;
    sorting = { key: column.key, down };
    const value = (row) => (column.text ? row[column.key] : row.error === null ? row.values[column.key] : null);
    const missing = (row) => value(row) === null || value(row) === undefined;
    const compare = (a, b) => (column.text ? a.localeCompare(b, "en", { numeric: true }) : a - b);
    data.rows.sort((a, b) => (missing(a) - missing(b)) || (missing(a) ? 0 : (down ? -1 : 1) * compare(value(a), value(b))));
    for (const one of columns) one.cell.setAttribute("aria-sort", one === column ? (down ? "descending" : "ascending") : "none");
    fill();
  }

  function fill() {
    body.replaceChildren(...visible().flatMap((row) => [row.line, row.details]));
  }

  // ---- both
  function hover(row, on) {
    row.line.classList.toggle("hover", on);
    for (const node of canvas.querySelectorAll(".point")) if (node.row === row) node.classList.toggle("hover", on);
  }

  function select(row, keep = false) {
    selected = selected === row && !keep ? null : row;
    mark();
  }

  function mark() {
    for (const row of data.rows) {
      row.line.classList.toggle("selected", row === selected);
      if (row === selected) row.line.setAttribute("aria-current", "true");
      else row.line.removeAttribute("aria-current");
    }
    for (const node of canvas.querySelectorAll(".point")) {
      node.classList.toggle("selected", node.row === selected);
      node.setAttribute("aria-pressed", String(node.row === selected));
    }
    const note = $("selected");
    if (!selected || hidden.has(selected.kind)) {
      note.replaceChildren("A point or a row can be selected.");
      return;
    }
    const show = element("button", { type: "button", class: "link" }, "Show its row");
    show.addEventListener("click", () => reveal(selected));
    const { texts } = selected;
    const facts = selected.error === null ? `${texts.score}%, ${texts.faster}× faster, ${texts.smaller}× smaller. ` : "failed. ";
    note.replaceChildren("Selected: ", element("code", {}, selected.method), `, ${facts}`, show);
  }

  function reveal(row) {
    if (hidden.has(row.kind)) {
      hidden.delete(row.kind);
      for (const box of $("kinds").querySelectorAll("input")) box.checked = !hidden.has(box.value);
      fill();
      draw();
    }
    select(row, true);
    row.line.scrollIntoView({ block: "center" });
    row.button.focus({ preventScroll: true });
  }

  function fillControls() {
    for (const direction of ["x", "y"]) {
      const list = $(`axis-${direction}`);
      list.append(...data.axes[direction].map((one) => element("option", { value: one.key }, one.label)));
      list.addEventListener("change", draw);
    }
    $("log").addEventListener("change", draw);
    for (const kind of data.kinds) {
      const box = element("input", { type: "checkbox", value: kind.name });
      box.checked = true;
      box.addEventListener("change", () => {
        if (box.checked) hidden.delete(kind.name);
        else hidden.add(kind.name);
        fill();
        draw();
      });
      $("kinds").append(element("label", { class: "kind" }, box, legendMark(kind.name), kind.name));
    }
    for (const link of document.querySelectorAll("[data-method]")) {
      link.addEventListener("click", (event) => {
        event.preventDefault();
        reveal(data.rows.find((row) => row.method === link.dataset.method));
      });
    }
  }

  // Storage is refused to some pages that are opened from a disk: the choice is then not kept.
  const stored = { get: () => { try { return localStorage.getItem("theme"); } catch { return null; } },
    set: (value) => { try { localStorage.setItem("theme", value); } catch { /* not kept */ } } };
  function theme() {
    const root = document.documentElement, button = $("theme"), system = matchMedia("(prefers-color-scheme: dark)");
    const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
    const show = () => { button.textContent = dark() ? "Light" : "Dark"; button.setAttribute("aria-label", `Use ${dark() ? "light" : "dark"} colours`); };
    const kept = stored.get();
    if (kept === "light" || kept === "dark") root.dataset.theme = kept;
    button.addEventListener("click", () => {
      root.dataset.theme = dark() ? "light" : "dark";
      stored.set(root.dataset.theme);
      show();
    });
    system.addEventListener("change", show);
    show();
  }

  theme();
  buildHead();
  data.rows.forEach(buildRow);
  fillControls();
  fill();
  draw();
  new ResizeObserver(() => { if (canvas.viewBox.baseVal.width !== plot.clientWidth) draw(); }).observe(plot);
  matchMedia("print").addEventListener("change", draw);
})();
