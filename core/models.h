/* SPDX-License-Identifier: Apache-2.0
 * models.h - what a result says of the models behind it. */
#ifndef MODELS_H
#define MODELS_H

#include "machine.h"

/* {"network": "flow", "gemm": "tiles and waves", "others": "roofline", ...}: where times came from; the network alone
 * where nothing computes. */
json_t *models_json(const struct topology *, enum net_tier, bool computes);

/* What a layer's experts ask of the models outside of their ranges, as results list it; NULL: nothing. row_bytes: there
 * and back; 0: bytes that are no rows. validity.c */
json_t *models_extrapolated(const struct moe_model *, const double row_bytes[2]);

#endif
