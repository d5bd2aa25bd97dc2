// Vercel's AI SDK with its provider for OpenAI, whose default is the Responses API.

import { createOpenAI } from '@ai-sdk/openai';

import * as sdk from './ai_sdk.mjs';

const connect = (baseURL) => createOpenAI({ baseURL, apiKey: 'unused' });
const chat = ({ base_url, model }) => connect(base_url).chat(model);
const responses = ({ base_url, model }) => connect(base_url)(model);

export const ask = (call) => sdk.ask(chat(call), call);
export const stream = (call) => sdk.stream(chat(call), call);
export const logprobs = (call) => sdk.logprobs(chat(call), call);
export const respond = (call) => sdk.ask(responses(call), call);
export const respond_stream = (call) => sdk.stream(responses(call), call);
export const parse = (call) => sdk.parse(chat(call), call);
export const parse_stream = (call) => sdk.parse_stream(chat(call), call);
export const parse_response = (call) => sdk.parse(responses(call), call);
export const call_tool = (call) => sdk.call_tool(chat(call), call);
export const call_tool_stream = (call) => sdk.call_tool_stream(chat(call), call);
export const call_tool_response = (call) => sdk.call_tool(responses(call), call);
export const answer_behind_tool = (call) => sdk.answer_behind_tool(chat(call), call);
