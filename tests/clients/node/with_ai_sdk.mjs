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
