// Markdown to elements. No string ever becomes HTML: text goes into text nodes, and addresses are let through by scheme,
// so that whatever a model writes stays something to read.

const DEEPEST = 8; // quotes and lists inside each other; what is deeper is text
const FENCE = /^ {0,3}(?:(`{3,})([^`]*)|(~{3,})(.*))$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:[ \t]+|$)(.*)$/;
const TABLE_RULE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

function element(name, ...children) {
  const made = document.createElement(name);
  made.append(...children);
  return made;
}

// Show `text` in `target`. Blocks that are the same as before are left alone, so that an answer that grows keeps its
// selection, and costs what is new.
export function show(target, text) {
  const blocks = split(text.split("\n"), 0);
  const before = target.moaiBlocks ?? [];
  let same = 0;
  while (same < blocks.length && same < before.length && blocks[same].source === before[same].source) same++;
  while (target.childNodes.length > same) target.lastChild.remove();
  for (const block of blocks.slice(same)) target.append(block.build());
  target.moaiBlocks = blocks;
}

// Lines to blocks, each with its source and a function that builds it.
function split(lines, depth) {
  const blocks = [];
  const add = (from, to, build) => blocks.push({ source: `${build.kind}\n${lines.slice(from, to).join("\n")}`, build });
  let i = 0;
  while (i < lines.length) {
    const line = lines[i];
    const start = i;
    let match;
    if (!line.trim()) {
      i++;
    } else if ((match = FENCE.exec(line))) {
      const mark = match[1] ?? match[3];
      const language = (match[2] ?? match[4]).trim().split(/\s/, 1)[0];
      const close = new RegExp(`^ {0,3}${mark[0]}{${mark.length},}[ \\t]*$`);
      for (i++; i < lines.length && !close.test(lines[i]); i++);
      const code = lines.slice(start + 1, i).join("\n");
      i++;
      add(start, i, named("code", () => codeBlock(code, language)));
    } else if ((match = HEADING.exec(line))) {
      const [, marks, title] = match;
      i++;
      add(start, i, named("heading", () => element(`h${Math.min(6, marks.length + 1)}`, ...inline(title, 0))));
    } else if (RULE.test(line)) {
      i++;
      add(start, i, named("rule", () => element("hr")));
    } else if (QUOTE.test(line) && depth < DEEPEST) {
      while (i < lines.length && (QUOTE.test(lines[i]) || (lines[i].trim() && !starts(lines[i])))) i++;
      const inner = lines.slice(start, i).map((one) => one.replace(QUOTE, ""));
      add(start, i, named("quote", () => nested("blockquote", inner, depth)));
    } else if (ITEM.test(line) && depth < DEEPEST) {
      i = endOfList(lines, i);
      const inner = lines.slice(start, i);
      add(start, i, named("list", () => list(inner, depth)));
    } else if (line.includes("|") && i + 1 < lines.length && lines[i + 1].includes("-") && TABLE_RULE.test(lines[i + 1])
               && cells(line).length === cells(lines[i + 1]).length) {
      for (i += 2; i < lines.length && lines[i].includes("|"); i++);
      const rows = lines.slice(start, i);
      add(start, i, named("table", () => table(rows)));
    } else {
      for (i++; i < lines.length && lines[i].trim() && !starts(lines[i]); i++);
      const words = lines.slice(start, i).map((one) => one.trim()).join("\n");
      add(start, i, named("paragraph", () => element("p", ...inline(words, 0))));
    }
  }
  return blocks;
}

function named(kind, build) {
  build.kind = kind;
  return build;
}

// Whether a line ends the paragraph before it.
function starts(line) {
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);
}

function nested(name, lines, depth) {
  return element(name, ...split(lines, depth + 1).map((block) => block.build()));
}

function codeBlock(code, language) {
  const copy = element("button", "Copy");
  copy.type = "button";
  copy.className = "copy-code";
  const pre = element("pre", element("code", code));
  pre.tabIndex = 0; // it scrolls, also by the keyboard
  const figure = element("figure", element("figcaption", element("span", language || "text"), copy), pre);
  figure.className = "code";
  return figure;
}

function endOfList(lines, from) {
  const indent = ITEM.exec(lines[from])[1].length;
  let i = from + 1;
  while (i < lines.length) {
    const line = lines[i];
    if (!line.trim()) {
      const next = lines[i + 1] ?? "";
      if (!ITEM.test(next) && next.search(/\S/) <= indent) return i;
    } else if (!ITEM.test(line) && line.search(/\S/) <= indent && (starts(line) || !lines[i - 1].trim())) {
      return i;
    }
    i++;
  }
  return i;
}

function list(lines, depth) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const ordered = /\d/.test(mark);
  const made = element(ordered ? "ol" : "ul");
  if (ordered) made.start = parseInt(mark, 10);
  let item = null;
  let loose = false;
  const close = () => {
    if (!item) return;
    const children = split(item, depth + 1).map((block) => block.build());
    // the text of a short item is no paragraph
    if (!loose && children[0]?.nodeName === "P") children.splice(0, 1, ...children[0].childNodes);
    made.append(element("li", ...children));
  };
  lines.forEach((line, i) => {
    const match = ITEM.exec(line);
    if (match && match[1].length <= indent.length + 1) {
      close();
      item = [match[3]];
    } else {
      item.push(line.replace(new RegExp(`^ {0,${indent.length + mark.length + 1}}`), ""));
      if (!line.trim() && i + 1 < lines.length) loose = true;
    }
  });
  close();
  return made;
}

function cells(row) {
  return row.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table(rows) {
  const sides = cells(rows[1]).map((rule) => (rule.endsWith(":") ? (rule.startsWith(":") ? "center" : "right") : ""));
  const line = (row, name) => {
    const texts = cells(row);
    return element("tr", ...sides.map((side, i) => {
      const cell = element(name, ...inline(texts[i] ?? "", 0));
      if (side) cell.className = side;
      return cell;
    }));
  };
  const body = element("tbody", ...rows.slice(2).map((row) => line(row, "td")));
  const frame = element("div", element("table", element("thead", line(rows[0], "th")), body));
  frame.className = "table";
  frame.tabIndex = 0;
  return frame;
}

const SPECIAL = /[\\`*_~[!<h\n]/g;
const ADDRESS = /https?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]}*_~、。)」]/y;
const LINK = /!?\[((?:[^[\]\\]|\\.)*)\]\(\s*<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:\s+["'][^"']*["'])?\s*\)/y;
const PAIRS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];

// The nodes of a text inside a block.
function inline(text, depth) {
  const nodes = [];
  const open = new Set(); // marks that nothing behind here closes: looked for once
  let plain = "";
  const flush = () => {
    if (plain) nodes.push(document.createTextNode(plain));
    plain = "";
  };
  let i = 0;
  while (i < text.length) {
    SPECIAL.lastIndex = i;
    const next = SPECIAL.exec(text)?.index ?? text.length;
    plain += text.slice(i, next);
    i = next;
    if (i >= text.length) break;
    const found = depth < DEEPEST ? special(text, i, depth, open) : null;
    if (found) {
      if (typeof found.node === "string") plain += found.node;
      else {
        flush();
        nodes.push(found.node);
      }
      i = found.end;
    } else {
      plain += text[i++];
    }
  }
  flush();
  return nodes;
}

function special(text, i, depth, open) {
  const at = text[i];
  if (at === "\n") return { node: element("br"), end: i + 1 };
  if (at === "\\") return /[!-/:-@[-`{-~]/.test(text[i + 1] ?? "") ? { node: text[i + 1], end: i + 2 } : null;
  if (at === "`") {
    const mark = /`+/y;
    mark.lastIndex = i;
    const ticks = mark.exec(text)[0];
    let end = text.indexOf(ticks, i + ticks.length);
    while (end >= 0 && text[end + ticks.length] === "`") end = text.indexOf(ticks, end + ticks.length + 1);
    if (end < 0) return { node: ticks, end: i + ticks.length };
    const code = text.slice(i + ticks.length, end).replace(/^ (.*[^ ].*) $/s, "$1");
    return { node: element("code", code), end: end + ticks.length };
  }
  if (at === "h") {
    ADDRESS.lastIndex = i;
    const match = ADDRESS.exec(text);
    return match && !/\w/.test(text[i - 1] ?? "") ? { node: link(match[0], [match[0]]), end: ADDRESS.lastIndex } : null;
  }
  if (at === "[" || at === "!") {
    LINK.lastIndex = i;
    const match = LINK.exec(text);
    if (!match || text[i] !== match[0][0]) return null;
    const shown = match[1] ? inline(match[1], DEEPEST - 1) : [match[2]];
    return { node: link(match[2], shown), end: LINK.lastIndex };
  }
  for (const [mark, name] of PAIRS) {
    if (!text.startsWith(mark, i) || open.has(mark) || !/\S/.test(text[i + mark.length] ?? " ")) continue;
    if (mark[0] === "_" && /[\p{L}\p{N}]/u.test(text[i - 1] ?? "")) continue;
    let end = text.indexOf(mark, i + mark.length + 1);
    while (end >= 0 && !closes(text, end, mark)) end = text.indexOf(mark, end + 1);
    if (end < 0) open.add(mark);
    else return { node: element(name, ...inline(text.slice(i + mark.length, end), depth + 1)), end: end + mark.length };
  }
  return null;
}

function closes(text, end, mark) {
  if (/\s/.test(text[end - 1])) return false;
  if (mark.length === 1 && (text[end + 1] === mark || text[end - 1] === mark)) return false;
  return mark[0] !== "_" || !/[\p{L}\p{N}]/u.test(text[end + mark.length] ?? "");
}

// A link where the address is of a kind that cannot run anything, else only its text. Pictures are links: showing one
// would tell its server who reads.
function link(address, shown) {
  if (!/^(https?:\/\/|mailto:)/i.test(address)) return element("span", ...shown);
  const made = element("a", ...shown);
  made.href = address;
  made.target = "_blank";
  made.rel = "noopener noreferrer nofollow";
  return made;
}
