/* SPDX-License-Identifier: Apache-2.0
 * models.c - which models a simulated machine's times came from. */
#include "config.h"

#include "latency_table.h"
#include "models.h"

json_t *models_json(const struct topology *topology, enum net_tier tier, bool computes)
{
    const struct latency_table *t = topology->tables;
    if (!computes)
        return json_pack("{s:s}", "network", net_tier_name[tier]);
    json_t *o = json_pack("{s:s, s:s, s:s}", "network", net_tier_name[tier], "gemm", "tiles and waves", "others",
                          "roofline");
    for (int f = 0; t && f < N_LATENCY_FAMILIES; f++) {
        static const char *const key[][3] = { { "gemm", "gemm_measured", "gemm_modelled" },
                                              { "others", "others_measured", "others_modelled" } };
        const struct latency_counts n = latency_table_counts(t, (enum latency_family)f);
        if (!n.any)
            continue;
        json_object_set_new(o, key[f][0], json_sprintf("table %s + %s", latency_table_files(t),
                                                       json_string_value(json_object_get(o, key[f][0]))));
        json_object_set_new(o, key[f][1], json_integer((json_int_t)n.measured));
        json_object_set_new(o, key[f][2], json_integer((json_int_t)n.modelled));
    }
    return o;
}
