// A driver that is not there: does what libcuda.so.1 does as far as the project uses it, and writes down what it is told.
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static char text[1 << 16];
static size_t contexts[8];
static int depth;
int fail_launch, fail_attribute;

const char* told(void) { return text; }
void forget(void) { text[0] = 0; }
int open_contexts(void) { return depth; }

static void tell(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text + strlen(text), sizeof(text) - strlen(text), format, arguments);
    va_end(arguments);
}

static size_t context(void) { return depth ? contexts[depth - 1] : 0; }

int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = 100 + ordinal, 0; }
int cuDevicePrimaryCtxRetain(size_t* made, int device) {
    tell("retain %d\n", device);
    return *made = 1000 + device, 0;
}
int cuCtxPushCurrent_v2(size_t pushed) { return contexts[depth++] = pushed, 0; }
int cuCtxPopCurrent_v2(size_t* popped) { return depth ? *popped = contexts[--depth], 0 : 201; }

int cuModuleLoadData(size_t* module, const char* image) {
    if (!context()) return 201;
    if (strstr(image, "refuse me")) return 218;
    tell("load in %zu\n", context());
    return *module = context(), 0;
}
int cuModuleGetFunction(size_t* function, size_t module, const char* name) {
    tell("function %s\n", name);
    return *function = module + 5000, 0;
}
int cuFuncSetAttribute(size_t function, int attribute, int value) {
    tell("attribute %d = %d of %zu\n", attribute, value, function);
    return fail_attribute;
}
int cuLaunchKernel(size_t function, unsigned x, unsigned y, unsigned z, unsigned threads_x, unsigned threads_y,
                   unsigned threads_z, unsigned shared, void* stream, void** arguments, void** extra) {
    if (fail_launch) return fail_launch;
    tell("launch %zu in %zu: (%u %u %u) (%u %u %u) %u B, stream %p, %s\n", function, context(), x, y, z, threads_x,
         threads_y, threads_z, shared, stream, extra ? "extra" : (const char*)arguments[0]);
    return 0;
}

int cuGetErrorName(int status, const char** name) {
    if (status == 999) return 1;
    *name = status == 218 ? "CUDA_ERROR_INVALID_PTX" : status == 1 ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_OTHER";
    return 0;
}
int cuGetErrorString(int status, const char** words) {
    if (status == 999) return 1;
    *words = status == 218 ? "a PTX JIT compilation failed" : status == 1 ? "invalid argument" : "other";
    return 0;
}
