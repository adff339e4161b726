// The page for talking: asks, shows answers while they are made, and keeps the conversation, in this tab alone.
// Texts of data, models and people are only ever set as textContent or as a field's value, where nothing is markup.

const find = (id) => document.getElementById(id);
const [instruction, context, examples, filter] = ["instruction", "context", "examples", "filter"].map(find);
const boxes = [...find("who").querySelectorAll("input[type=checkbox]")];
const most = Number(find("who").dataset.most);
const settings = ["temperature", "top_p", "max_new_tokens", "seed"];

let running = null; // stops the question that is being answered
let kept = null; // the conversation so far, as it is downloaded

// Asking ---------------------------------------------------------------------------------------------

async function ask() {
  if (running) return;
  running = new AbortController();
  const who = asked();
  let fields = []; // of the answers, from the moment that they are made
  let now = null; // this question as a conversation of its own
  complain("");
  showButtons();
  const hears = {
    waiting: (ahead) => tell(ahead === 1 ? "Another question is before yours." : `${ahead} questions are before yours.`),
    begin: (data) => {
      now = data;
      fields = showBoxes(who);
      for (const { box } of fields) box.setAttribute("aria-busy", "true");
      showReference(data.exchanges[0].question.reference);
      tell("Answering …");
    },
    answers: (data) => {
      now.exchanges[0].answers = data;
      data.forEach((answer, number) => grow(fields[number], answer));
    },
    end: (data) => {
      data.forEach((length, number) => name(fields[number], ` · ${length}`));
      tell("");
    },
    problem: complain,
  };
  try {
    await listen(question(), running.signal, hears);
  } catch (error) {
    if (error.name === "AbortError") tell("Stopped.");
    else complain(error instanceof Refused ? error.message : `The server does not answer (${error.message}); is it still running?`);
  }
  running = null;
  for (const { box } of fields) box.removeAttribute("aria-busy");
  showButtons();
  if (now?.exchanges[0].answers.some((answer) => answer.tokens || answer.ended)) keep(now);
}

/** What the fields hold, as the server takes it; an empty setting is null. */
function question() {
  const numbers = settings.map((id) => [id, Number.isNaN(find(id).valueAsNumber) ? null : find(id).valueAsNumber]);
  return {
    instruction: instruction.value,
    context: context.value,
    example: examples?.value ? Number(examples.value) : null,
    who: asked().map((box) => Number(box.value)),
    ...Object.fromEntries(numbers),
  };
}

class Refused extends Error {}

/** Ask the server, and hand over each thing that it tells until the last. */
async function listen(body, signal, hears) {
  const response = await fetch("ask", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw new Refused((await response.text()).trim());
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let kind = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const [first, second] = event.split("\n");
      kind = first.slice("event: ".length);
      hears[kind](JSON.parse(second.slice("data: ".length)));
    }
  }
  if (kind !== "end" && kind !== "problem") throw new Error("the connection is lost");
}

// Showing --------------------------------------------------------------------------------------------

function tell(text) {
  find("status").textContent = text;
}

function complain(text) {
  tell("");
  find("problem").textContent = text;
  find("problem").hidden = !text;
}

function element(kind, text, className = "") {
  const made = document.createElement(kind);
  made.textContent = text;
  made.className = className;
  made.dir = "auto";
  return made;
}

function nameOf(box) {
  return box.parentElement.textContent;
}

function asked() {
  return boxes.filter((box) => box.checked);
}

/** Show empty answers of those who answer, and return their fields. */
function showBoxes(who) {
  const fields = who.map((box) => {
    const made = find("answer").content.cloneNode(true).firstElementChild;
    const field = { box: made, who: nameOf(box), title: made.querySelector("h2"), text: made.querySelector(".text") };
    name(field, "");
    return field;
  });
  find("answers").replaceChildren(...fields.map((field) => field.box));
  return fields;
}

function name(field, length) {
  field.title.replaceChildren(element("bdi", field.who), element("span", length, "note"));
}

function grow(field, answer) {
  if (field.text.textContent !== answer.text) field.text.textContent = answer.text;
  field.box.setAttribute("aria-busy", String(!answer.ended));
}

function showReference(text) {
  find("reference").textContent = text;
  find("data").hidden = !text;
}

function showButtons() {
  find("ask").disabled = Boolean(running);
  find("stop").disabled = !running;
  find("download").disabled = find("clear").disabled = !kept;
}

// The conversation -----------------------------------------------------------------------------------

/** Add a question with its answers to the conversation. */
function keep(one) {
  const before = kept ?? { templates: {}, exchanges: [] };
  kept = {
    ...one,
    templates: { ...before.templates, ...one.templates },
    exchanges: [...before.exchanges, ...one.exchanges],
  };
  showConversation();
}

function showConversation() {
  find("said").replaceChildren(...(kept?.exchanges ?? []).map(exchange));
  showButtons();
}

function exchange({ question, answers }, number) {
  const list = document.createElement("dl");
  const texts = [["Context", question.context], ...answers.map(({ name, text }) => [name, text]), ["In the data", question.reference]];
  texts.forEach(([who, text], place) => {
    const extra = place === 0 || place === texts.length - 1;
    if (text || !extra) list.append(element("dt", who), element("dd", text, "text"));
  });
  const made = document.createElement("article");
  made.append(element("h3", `${number + 1}. ${question.instruction}`, "text"), list);
  return made;
}

function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([`${JSON.stringify(kept, null, 1)}\n`], { type: "application/json" }));
  link.download = "conversation.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

// What happens on which event ------------------------------------------------------------------------

/** Let nobody be chosen beyond the room that the page has. */
function limit() {
  const full = asked().length >= most;
  for (const box of boxes) box.disabled = full && !box.checked;
}

find("ask").addEventListener("click", ask);
find("stop").addEventListener("click", () => running?.abort());
instruction.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
find("who").addEventListener("change", (event) => {
  if (event.target.type !== "checkbox") return;
  limit();
  if (!running) showBoxes(asked());
});
filter?.addEventListener("input", () => {
  const wanted = filter.value.trim().toLowerCase();
  for (const box of boxes) box.parentElement.hidden = !nameOf(box).toLowerCase().includes(wanted);
});
examples?.addEventListener("change", () => {
  const chosen = examples.selectedOptions[0].dataset;
  instruction.value = chosen.instruction ?? "";
  context.value = chosen.context ?? "";
});
for (const range of document.querySelectorAll("input[type=range]")) {
  const number = find(range.dataset.for);
  range.addEventListener("input", () => (number.value = range.value));
  number.addEventListener("input", () => (range.value = number.value));
}
find("download").addEventListener("click", download);
find("clear").addEventListener("click", () => {
  kept = null;
  showConversation();
});

// The token of a page for other machines is in a cookie by now, and need not stay in sight.
if (location.search) history.replaceState(null, "", location.pathname);
limit();
showBoxes(asked());
