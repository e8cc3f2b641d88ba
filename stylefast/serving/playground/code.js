// The same request for a shell and for Python. The key is not in it: both take it from OPENAI_API_KEY.

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

// the name of a file as it may stand in a command: nothing that a shell or curl reads as more than a name
export const fileName = (image) => (image.name || "").replace(/[^\w.-]+/g, "_").replace(/^[.-]+/, "") || "reference.png";

export function curl({ route, fields, image }, base, withKey) {
  const lines = [`curl ${quoted(`${base}/${route}`)}`];
  if (withKey) lines.push(`-H "authorization: Bearer $OPENAI_API_KEY"`);
  if (image) {
    lines.push(`-F ${quoted(`image=@${fileName(image)}`)}`);
    for (const [name, value] of Object.entries(fields)) {
      const text = typeof value === "object" ? JSON.stringify(value) : String(value);
      lines.push(`--form-string ${quoted(`${name}=${text}`)}`);
    }
  } else {
    lines.push(`-H 'content-type: application/json'`, `-d ${quoted(JSON.stringify(fields))}`);
  }
  return `${lines.join(" \\\n  ")} \\\n  -o reply.json\n`;
}

function literal(value) {
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (value && typeof value === "object") {
    return `{${Object.entries(value).map(([name, one]) => `${literal(name)}: ${literal(one)}`).join(", ")}}`;
  }
  return JSON.stringify(value); // of texts and numbers, what JSON writes is Python too
}

export function python({ route, fields, image }, base, withKey) {
  const { stylefast, ...named } = fields;
  const given = Object.entries(named).map(([name, value]) => `${name}=${literal(value)}`);
  if (image) given.unshift(`image=open(${literal(fileName(image))}, "rb")`);
  if (stylefast) given.push(`extra_body={"stylefast": ${literal(stylefast)}}`);
  const client = withKey ? "" : `, api_key="none"`;
  return [
    "import base64",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(`${base}/v1`)}${client})`,
    `reply = client.images.${image ? "edit" : "generate"}(`,
    ...given.map((one) => `    ${one},`),
    ")",
    "for i, picture in enumerate(reply.data):",
    `    with open(f"picture-{i}.png", "wb") as file:`,
    "        file.write(base64.b64decode(picture.b64_json))",
    "",
  ].join("\n");
}
