/* SPDX-License-Identifier: Apache-2.0
 * npy.h - NumPy's .npy files, versions 1 to 3: mapped read-only, checked before use, written through a temporary. */
#ifndef NPY_H
#define NPY_H

#include "err.h"
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define NPY_MAX_DIMS 4

struct npy {
    char path[512];
    char kind;           /* 'u' 'i' 'f' 'b' */
    int item_bytes;
    int n_dims;
    int64_t shape[NPY_MAX_DIMS];
    int64_t count;       /* product of shape */
    const void *data;    /* C order, native endianness, aligned to item_bytes; valid until npy_close */
    void *map;
    size_t map_bytes;
};

/* path "-": standard input, however often it is opened. Refuses: no such file, truncated or trailing bytes, bad magic
 * or header, Fortran order, big endian, object or structured dtypes, more than 4 dimensions, sizes that overflow.
 * Messages name the file, found and expected. */
int npy_open(struct npy *, const char *path, struct err *);
void npy_close(struct npy *);
/* dtypes: a list such as "u1|u2" (kind and bytes); shape: n_dims entries, -1 for any. */
int npy_expect(const struct npy *, const char *dtypes, int n_dims, const int64_t *shape, struct err *);
/* Every element finite (always true of integers); the error names the first that is not. */
int npy_expect_finite(const struct npy *, struct err *);
/* Every element of an integer array in min..max; the error names the first that is not. */
int npy_expect_range(const struct npy *, int64_t min, int64_t max, struct err *);
/* "[3,0,17]" for element i, as messages write it. Returns text. */
const char *npy_element(const struct npy *, int64_t i, char text[96]);

/* Element i as double / int64, whatever the dtype. Reals are cut towards zero; what int64 cannot hold becomes its
 * nearest value, NaN becomes 0. */
double npy_real(const struct npy *, int64_t i);
int64_t npy_int(const struct npy *, int64_t i);
/* n elements from i on, converted to f32. */
void npy_floats(const struct npy *, int64_t i, int64_t n, float *out);

/* dtype "f4", "u1", ...; written to PATH.part and renamed. */
int npy_write(const char *path, const char *dtype, int n_dims, const int64_t *shape, const void *data, struct err *);

/* The same, piece by piece: npy_create, npy_append..., npy_finish. A writer that failed, or was not finished, leaves
 * nothing behind after npy_abandon, which may be called at any time and twice. */
struct npy_writer {
    char path[512], part[520];
    FILE *file;
    int64_t left; /* bytes still to come */
};
int npy_create(struct npy_writer *, const char *path, const char *dtype, int n_dims, const int64_t *shape,
               struct err *);
int npy_append(struct npy_writer *, const void *data, size_t bytes, struct err *);
int npy_finish(struct npy_writer *, struct err *);
void npy_abandon(struct npy_writer *);

float npy_half_to_float(uint16_t);
uint16_t npy_float_to_half(float); /* round to nearest even */

#endif
