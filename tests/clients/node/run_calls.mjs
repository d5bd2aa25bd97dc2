// The same for Node's clients as callers/run_calls.py is for Python's: node run_calls.mjs MODULE

import { createInterface } from 'node:readline';

// What clients print must not come between the answers.
console.log = console.info = console.warn = console.error;
const module = await import(`./${process.argv[2]}.mjs`);

function describe(error) {
  const classes = [];
  for (let kind = error; kind && kind !== Object.prototype; kind = Object.getPrototypeOf(kind)) {
    const name = kind === error ? error.name : kind.constructor?.name;
    if (name && !classes.includes(name)) classes.push(name);
  }
  const others = {};
  for (const name of ['status', 'statusCode', 'code', 'param', 'type']) {
    if (['string', 'number'].includes(typeof error[name])) others[name] = error[name];
  }
  return { classes, message: String(error.message), ...others };
}

for await (const line of createInterface({ input: process.stdin })) {
  const { function: name, arguments: args } = JSON.parse(line);
  let answer;
  try {
    answer = { value: (await module[name](args)) ?? null };
  } catch (error) {
    console.error(error);
    answer = { error: describe(error) };
  }
  process.stdout.write(JSON.stringify(answer) + '\n');
}
process.exit(0); // connections that are kept alive would hold the process
