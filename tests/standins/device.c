/* SPDX-License-Identifier: Apache-2.0
 * device.c - see standin.h: what the module asks about the device for a machine file alone; timed.c is what measuring
 * is tested with. */
#include "standin.h"

#include <cublas_v2.h>

static int capability[] = { 9, 0 };

void standin_capability(int major, int minor)
{
    capability[0] = major;
    capability[1] = minor;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr what, int device)
{
    *value = what == cudaDevAttrComputeCapabilityMajor ? capability[0]
             : what == cudaDevAttrComputeCapabilityMinor ? capability[1] : 0;
    return device >= 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

cublasStatus_t cublasGetVersion(cublasHandle_t h, int *version)
{
    (void)h;
    *version = CUBLAS_VERSION;
    return CUBLAS_STATUS_SUCCESS;
}
