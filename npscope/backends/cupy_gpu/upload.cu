// Carries the bytes of a launch into device memory.

#include "elements.cuh"

struct Bytes {
    u8 bytes[3584];
};

extern "C" __global__ void upload(Bytes from, u8* to, i64 count) {
    for (i64 i = threadIdx.x; i < count; i += blockDim.x) to[i] = from.bytes[i];
}
