// The same as callers/shape.py.

import { z } from 'zod';

export const Shape = z.strictObject({
  kind: z.enum(['circle', 'square', 'triangle']),
  color: z.enum(['red', 'green', 'blue']),
  is_filled: z.boolean(),
});
