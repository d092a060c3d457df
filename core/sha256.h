/* SPDX-License-Identifier: Apache-2.0
 * sha256.h - SHA-256 (FIPS 180-4), for checksums of traces and in manifests. */
#ifndef SHA256_H
#define SHA256_H

#include "err.h"
#include <stddef.h>
#include <stdint.h>

struct sha256 {
    uint32_t h[8];
    uint64_t n_bytes;     /* hashed so far */
    unsigned char block[64];
};

void sha256_init(struct sha256 *);
void sha256_update(struct sha256 *, const void *data, size_t bytes);
/* The digest as 64 lower-case hex digits and a NUL. */
void sha256_final(struct sha256 *, char hex[65]);
int sha256_file(const char *path, char hex[65], struct err *);

#endif
