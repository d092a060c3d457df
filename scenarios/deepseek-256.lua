-- SPDX-License-Identifier: Apache-2.0
--
-- One decode step of DeepSeek-V3 on 256 GPUs, two experts of each layer on each: tests/bench.sh times it.
require "lib.decode_step"(32, 2)
