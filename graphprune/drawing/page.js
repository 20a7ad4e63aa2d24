"use strict";
// Draws what Python laid out. Names are data: they become text nodes, never markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const [view, paper, canvas, panel, search, found] =
    ["view", "paper", "canvas", "panel", "search", "found"].map(id => document.getElementById(id));
  const narrow = matchMedia("(max-width: 720px)");
  const ids = Object.keys(data.nodes);
  const buttons = new Map();
  const neighbours = new Map(ids.map(id => [id, new Set()]));
  data.edges.forEach(([a, b]) => { neighbours.get(a).add(b); neighbours.get(b).add(a); });
  let places, paths = [], scale = 1, current = ids[0], chosen = null;

  function make(kind, attributes = {}, ...children) {
    const made = document.createElement(kind);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (name === "class") made.className = value;
      else made.setAttribute(name, value);
    }
    made.append(...children.filter(child => child !== null && child !== ""));
    return made;
  }
  const times = node => node.times > 1 ? ` ×${node.times}` : "";
  const number = value => value.toLocaleString("en");

  // A name that may break where it is made of parts.
  const breakable = name => name.split(/(?<=[._])/).flatMap((part, n) => n ? [make("wbr"), part] : [part]);

  function bar(share) {
    const inside = make("span");
    inside.style.width = `${100 * share}%`;
    return make("span", { class: "bar", "aria-hidden": "true" }, inside);
  }

  function button(id) {
    const node = data.nodes[id];
    const label = [node.side, node.name + times(node), ...node.lines].join(", ");
    const made = make("button", { type: "button", class: `node ${node.side} ${node.look}`, "data-id": id, tabindex: -1,
      "aria-label": label, title: node.name, onclick: () => choose(id), onfocus: () => settle(id) },
      node.path ? make("i", {}, node.path) : "",
      make("b", {}, ...breakable(node.short), make("span", { class: "times" }, times(node))),
      ...node.lines.map(line => make("em", {}, line)));
    if (node.share !== undefined && node.share !== null) made.append(bar(node.share));
    return made;
  }

  function put(element, [x, y, width, height]) {
    Object.assign(element.style, { left: `${x}px`, top: `${y}px`, width: `${width}px`, height: `${height}px` });
    return element;
  }

  function draw() {
    places = narrow.matches ? data.narrow : data.wide;
    canvas.className = narrow.matches ? "narrow" : "";
    canvas.replaceChildren();
    for (const [place, title, composed] of places.frames)
      canvas.append(put(make("div", { class: composed ? "frame composed" : "frame" }, make("span", {}, title)), place));
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("width", places.size[0]);
    svg.setAttribute("height", places.size[1]);
    svg.setAttribute("aria-hidden", "true");
    paths = places.lines.map((line, n) => {
      const [source, target, dim, consumes] = data.edges[n];
      const path = document.createElementNS(svg.namespaceURI, "path");
      path.setAttribute("d", line);
      const kind = dim === null ? "of-operator" : `of-${data.nodes[target].look}`;
      path.setAttribute("class", consumes ? `${kind} consumes` : kind);
      svg.append(path);
      return path;
    });
    canvas.append(svg);
    // In the order in which they are read: column by column, from top to bottom.
    const column = id => ["tensor", "group", "operator"].indexOf(data.nodes[id].side);
    ids.sort((a, b) => column(a) - column(b) || places.nodes[a][1] - places.nodes[b][1]);
    for (const id of ids) {
      if (!buttons.has(id)) buttons.set(id, button(id));
      canvas.append(put(buttons.get(id), places.nodes[id]));
    }
    settle(current);
    fit();
    mark();
  }

  function zoom(to) {
    const before = scale;
    scale = Math.min(3, Math.max(0.2, to));
    const middle = [view.scrollLeft + view.clientWidth / 2, view.scrollTop + view.clientHeight / 2];
    canvas.style.transform = `scale(${scale})`;
    paper.style.width = `${places.size[0] * scale}px`;
    paper.style.height = `${(places.size[1] + 4) * scale}px`;
    view.scrollLeft = middle[0] * scale / before - view.clientWidth / 2;
    view.scrollTop = middle[1] * scale / before - view.clientHeight / 2;
  }

  function room() {
    return (view.clientWidth - parseFloat(getComputedStyle(view).paddingLeft) * 2) / places.size[0];
  }

  function fit() {
    zoom(narrow.matches ? Math.min(1.15, Math.max(0.85, room())) : Math.min(1.25, Math.max(0.6, room())));
    view.scrollTo(0, 0);
  }

  function settle(id) {
    buttons.get(current)?.setAttribute("tabindex", -1);
    current = id;
    buttons.get(id).setAttribute("tabindex", 0);
  }

  function go(id) {
    settle(id);
    buttons.get(id).focus({ preventScroll: true });
    buttons.get(id).scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  function mark() {
    canvas.classList.toggle("chosen", chosen !== null);
    for (const [id, made] of buttons) {
      made.classList.toggle("self", id === chosen);
      made.classList.toggle("near", chosen !== null && (id === chosen || neighbours.get(chosen).has(id)));
      if (id === chosen) made.setAttribute("aria-current", "true"); else made.removeAttribute("aria-current");
    }
    paths.forEach((path, n) =>
      path.classList.toggle("near", chosen !== null && data.edges[n].slice(0, 2).includes(chosen)));
  }

  function choose(id) {
    chosen = id;
    mark();
    panel.replaceChildren(...say(id));
    if (panel.hidden) {
      panel.hidden = false;
      if (!narrow.matches) zoom(Math.min(scale, Math.max(0.6, room())));
    }
    panel.scrollTop = 0;
    panel.querySelector("h2").focus({ preventScroll: true });
    buttons.get(id).scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  function close() {
    const id = chosen;
    chosen = null;
    panel.hidden = true;
    mark();
    if (id !== null) go(id);
  }

  // The panel

  function link(id, text) {
    return make("button", { type: "button", class: "link", onclick: () => { settle(id); choose(id); } },
      ...breakable(text ?? data.nodes[id].name + times(data.nodes[id])));
  }
  const list = items => make("ul", {}, ...items.map(item => make("li", {}, ...item)));
  const small = text => make("small", {}, text);

  function say(id) {
    const node = data.nodes[id];
    const parts = [
      make("button", { type: "button", class: "close", "aria-label": "Close details", onclick: close }, "✕"),
      make("h2", { tabindex: -1 }, ...breakable(node.name + times(node))),
    ];
    const section = (title, ...content) => parts.push(make("h3", {}, title), ...content);
    if (node.side === "group") group(id, node, parts, section);
    else if (node.side === "tensor") tensor(id, node, parts, section);
    else {
      parts.push(make("p", {}, "operator at ", make("code", {}, node.lines[0])));
      section("Computed along", list([...neighbours.get(id)].map(other => [link(other)])));
    }
    return parts;
  }

  function group(id, node, parts, section) {
    parts.push(make("p", {}, make("span", { class: `badge ${node.look}` }, node.kind), " ",
      node.lines[0].replace(`, ${node.kind}`, "")));
    if (node.reason) section("Why it is left alone", make("p", {}, node.reason));
    section("Removal structures", make("p", {}, `${node.structures}${node.times > 1 ? " in each block" : ""}, ` +
      `${number(node.slices)} ${node.slices === 1 ? "slice" : "slices"} each`));
    if (node.kept.length) section("Kept", list(node.kept.map(([name, before, after]) => [make("div", { class: "layer" },
      make("span", {}, ...breakable(name)), bar(after / before), make("span", {}, `${number(before)} → ${number(after)}`))])));
    const members = data.edges.filter(([a, b, dim]) => b === id && dim !== null);
    section("Parameters", list(members.map(([tensor, , dim, consumes]) => [link(tensor),
      small(`dimension ${dim} of ${data.nodes[tensor].lines[0]}, ${consumes ? "summed away" : "produced"}`)])));
    if (node.elsewhere) parts.push(make("p", {}, `and ${number(node.elsewhere)} dimensions that are not drawn`));
    if (node.composed.length) section("Overlaps with composed groups", list(node.composed.map(name => [name])));
    if (node.operators.length) section("Operators", list(node.operators.map(one => {
      const others = one.groups.filter(other => other !== id);
      const also = others.length ? small(["also in "]) : "";
      if (also) others.forEach((other, n) => also.append(n ? ", " : "", link(other, data.nodes[other].name)));
      return [`${one.name}${one.count > 1 ? ` ×${number(one.count)}` : ""}`, small(one.where), also];
    })));
  }

  function tensor(id, node, parts, section) {
    parts.push(make("p", {}, `${node.kind} ${node.lines[0]}`));
    if (node.parameters) parts.push(make("p", {}, `${number(node.parameters)} parameters${node.times > 1 ? " each" : ""}`));
    section("Dimensions", list(node.dims.map((text, dim) => {
      const groups = data.edges.filter(([a, , of]) => a === id && of === dim).map(([, b]) => b);
      const links = groups.flatMap((other, n) => n ? [", ", link(other)] : [link(other)]);
      return [`${dim}: ${text}`, make("small", {}, ...links)];
    })));
    if (node.tied.length) section("Tied to", list(node.tied.map(name => [name])));
  }

  // Search

  const texts = new Map(ids.map(id => {
    const node = data.nodes[id];
    const own = [node.name, node.kind, ...node.lines, node.reason, ...(node.tied ?? []), ...(node.composed ?? []),
      ...(node.operators ?? []).flatMap(one => [one.name, one.where])];
    return [id, own.join("\n").toLowerCase()];
  }));

  function seek() {
    const wanted = search.value.trim().toLowerCase();
    const matches = wanted ? ids.filter(id => texts.get(id).includes(wanted)) : [];
    canvas.classList.toggle("sought", wanted !== "");
    for (const [id, made] of buttons) made.classList.toggle("match", matches.includes(id));
    found.textContent = wanted ? `${matches.length} of ${ids.length}` : "";
    return matches;
  }

  search.addEventListener("input", () => {
    const matches = seek();
    if (matches.length) buttons.get(matches[0]).scrollIntoView({ block: "nearest", inline: "nearest" });
  });
  search.addEventListener("keydown", event => {
    if (event.key === "Enter") {
      event.preventDefault(); // or it would press what gets the focus
      const matches = seek();
      if (matches.length) go(matches[(matches.indexOf(current) + 1) % matches.length]);
    } else if (event.key === "Escape" && search.value) {
      search.value = "";
      seek();
      event.stopPropagation();
    }
  });

  // Keys and pointers

  function beside(id, key) {
    const [x, y, width, height] = places.nodes[id];
    const middle = y + height / 2;
    if (key === "ArrowUp" || key === "ArrowDown") {
      const column = ids.filter(other => data.nodes[other].side === data.nodes[id].side);
      return column[column.indexOf(id) + (key === "ArrowDown" ? 1 : -1)];
    }
    const side = key === "ArrowRight" ? 1 : -1;
    const far = other => Math.abs(places.nodes[other][1] + places.nodes[other][3] / 2 - middle);
    return [...neighbours.get(id)].filter(other => side * (places.nodes[other][0] - x) > width / 2)
      .sort((a, b) => far(a) - far(b))[0];
  }

  canvas.addEventListener("keydown", event => {
    const id = event.target.dataset?.id;
    if (id === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    const to = { Home: ids[0], End: ids[ids.length - 1] }[event.key] ??
      (event.key.startsWith("Arrow") ? beside(id, event.key) : undefined);
    if (to !== undefined) go(to);
    if (to !== undefined || event.key.startsWith("Arrow")) event.preventDefault();
  });
  document.addEventListener("keydown", event => {
    if (event.key === "Escape" && chosen !== null) close();
    if (event.target === search || event.ctrlKey || event.metaKey || event.altKey) return;
    const does = { "/": () => search.focus(), "+": () => zoom(scale * 1.25), "=": () => zoom(scale * 1.25),
      "-": () => zoom(scale / 1.25), "0": fit }[event.key];
    if (does) { does(); event.preventDefault(); }
  });
  document.getElementById("in").addEventListener("click", () => zoom(scale * 1.25));
  document.getElementById("out").addEventListener("click", () => zoom(scale / 1.25));
  document.getElementById("fit").addEventListener("click", fit);
  view.addEventListener("wheel", event => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    zoom(scale * Math.exp(-event.deltaY / 300));
  }, { passive: false });
  let grip = null;
  view.addEventListener("pointerdown", event => {
    if (event.pointerType === "mouse" && event.button === 0 && !event.target.closest(".node"))
      grip = [event.clientX + view.scrollLeft, event.clientY + view.scrollTop];
  });
  addEventListener("pointermove", event => {
    if (!grip) return;
    view.classList.add("dragged");
    view.scrollTo(grip[0] - event.clientX, grip[1] - event.clientY);
  });
  addEventListener("pointerup", () => { grip = null; view.classList.remove("dragged"); });
  narrow.addEventListener("change", draw);
  addEventListener("resize", () => places && (places === data.wide) && chosen === null && fit());

  draw();
})();
