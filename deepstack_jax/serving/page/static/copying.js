// Requests as text for other programs: curl, Python with the `openai` package, and JSON. The API key is never in them.

const EXTENSIONS = ["top_k", "deepstack_scales", "timeline", "return_token_ids"]; // `openai` passes them in extra_body
const VARIABLE = "DEEPSTACK_JAX_API_KEY";

/** A command for a POSIX shell. The body comes in a here-document, as pictures are longer than an argument may be. */
export function asCurl(body, origin, needsKey) {
  const header = needsKey ? ` \\\n  -H "authorization: Bearer $${VARIABLE}"` : "";
  return `curl ${origin}/v1/chat/completions -H 'content-type: application/json'${header} --data @- <<'BODY'
${JSON.stringify(body)}
BODY
`;
}

/** A program that prints the answer. */
export function asPython(body, origin, needsKey) {
  const plain = Object.entries(body).filter(([name]) => !EXTENSIONS.includes(name));
  const more = Object.fromEntries(Object.entries(body).filter(([name]) => EXTENSIONS.includes(name)));
  const given = Object.keys(more).length ? [...plain, ["extra_body", more]] : plain;
  const key = needsKey ? `os.environ["${VARIABLE}"]` : '"none"';
  const lines = given.map(([name, value]) => `    ${name}=${python(value, 1)},`);
  return `${needsKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${origin}/v1", api_key=${key})
answer = client.chat.completions.create(
${lines.join("\n")}
)
print(answer.choices[0].message.content)
`;
}

/** The body itself. */
export const asJson = (body) => `${JSON.stringify(body, null, 2)}\n`;

function python(value, depth) {
  if (value === null || value === undefined) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value); // strings of JSON are strings of Python
  const [inner, outer] = ["    ".repeat(depth + 1), "    ".repeat(depth)];
  const items = Array.isArray(value)
    ? value.map((item) => python(item, depth + 1))
    : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${python(item, depth + 1)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  return items.length ? `${open}\n${items.map((item) => `${inner}${item},\n`).join("")}${outer}${close}` : open + close;
}
