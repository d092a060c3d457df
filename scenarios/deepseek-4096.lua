-- SPDX-License-Identifier: Apache-2.0
--
-- One decode step of DeepSeek-V3 on 4,096 GPUs, one expert of each layer on each: tests/bench.sh times it.
require "lib.decode_step"(512, 1)
