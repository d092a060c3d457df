/* SPDX-License-Identifier: Apache-2.0
 * fuzz.h - what a fuzz target gives: libFuzzer's entry point, and valid inputs for driver.c to spoil. */
#ifndef FUZZ_H
#define FUZZ_H

#include <stddef.h>
#include <stdint.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
/* Valid input number i into out (at most `room` bytes); returns its size, 0 when there are no more. */
size_t fuzz_seed(int i, uint8_t *out, size_t room);
extern const char fuzz_name[];

#endif
