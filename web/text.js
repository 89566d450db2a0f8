// Shows what a node of this pack has to say after a run: notices, figures, where a file went.
// ComfyUI itself draws text for its own nodes only. The text is a view: it is neither saved nor sent.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const NAME = "mend_text";
const HEIGHT = 88;

function textWidget(node) {
  const existing = node.widgets?.find((widget) => widget.name === NAME);
  if (existing) return existing;
  const element = document.createElement("div");
  Object.assign(element.style, {
    background: "var(--comfy-input-bg)",
    color: "var(--input-text)",
    fontSize: "11px",
    overflow: "auto",
    padding: "4px 6px",
    userSelect: "text",
    whiteSpace: "pre-wrap",
  });
  element.setAttribute("role", "status");
  const widget = node.addDOMWidget(NAME, "MEND_TEXT", element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => HEIGHT,
    getValue: () => element.textContent,
    setValue: () => {},
  });
  widget.serialize = false;
  // a saved node may have this room already
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  return widget;
}

function show(node, text) {
  if (text || node.widgets?.some((widget) => widget.name === NAME)) {
    textWidget(node).element.textContent = text;
    node.graph?.setDirtyCanvas(true, true);
  }
}

// "12", or "5:12" of a node in a subgraph
function nodeAt(path) {
  let graph = app.rootGraph ?? app.graph;
  let node;
  for (const id of String(path).split(":")) {
    node = graph?.getNodeById(id);
    graph = node?.subgraph;
  }
  return node;
}

// a node that runs again may have nothing to say, and then says nothing of it
api.addEventListener("executing", ({ detail }) => {
  const node = detail && nodeAt(detail);
  if (node?.comfyClass?.startsWith("Mend")) show(node, "");
});

app.registerExtension({
  name: "Mend.Text",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("Mend")) return;
    const executed = node.onExecuted;
    node.onExecuted = function (output) {
      executed?.apply(this, arguments);
      show(this, (output?.text ?? []).join("\n"));
    };
  },
});
