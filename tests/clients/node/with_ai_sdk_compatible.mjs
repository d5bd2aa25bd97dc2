// Vercel's AI SDK with its provider for servers that speak OpenAI's API.

import { createOpenAICompatible } from '@ai-sdk/openai-compatible';

import * as sdk from './ai_sdk.mjs';

const connect = ({ base_url, model }) =>
  createOpenAICompatible({ name: 'vitrine', baseURL: base_url, includeUsage: true, supportsStructuredOutputs: true })(
    model,
  );

export const ask = (call) => sdk.ask(connect(call), call);
export const stream = (call) => sdk.stream(connect(call), call);
export const parse = (call) => sdk.parse(connect(call), call);
export const parse_stream = (call) => sdk.parse_stream(connect(call), call);
export const call_tool = (call) => sdk.call_tool(connect(call), call);
export const call_tool_stream = (call) => sdk.call_tool_stream(connect(call), call);
