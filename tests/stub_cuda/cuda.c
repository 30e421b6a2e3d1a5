/* CUDA without a GPU: device memory is the heap, kernels do nothing, and each call writes a line to a log.
 *
 * This file has the functions that need behaviour. library.py generates the rest of the symbols that onnxruntime's CUDA
 * provider looks up: weak functions that log their name and succeed. A function in this file overrides its weak one.
 *
 * A line is `NAME KEY=VALUE ...`; graph=N means that the call was captured instead of executed. While a stream
 * captures, calls that CUDA forbids fail as they do on a GPU. Launching a graph runs its copies and host functions.
 * Calls must come from one thread at a time.
 */
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, FORBIDDEN = 900 /* cudaErrorStreamCaptureUnsupported */, NOT_SUPPORTED = 3000 /* cuDNN */ };

typedef struct { unsigned x, y, z; } dim3;
typedef void host_function(void *);

/* ---- the log ---- */

static void __attribute__((format(printf, 2, 3))) note(const char *name, const char *format, ...) {
    static FILE *file;
    if (!file) {
        file = fopen(getenv("STUB_CUDA_LOG"), "a");
        setlinebuf(file);
    }
    char line[4096];
    va_list values;
    va_start(values, format);
    vsnprintf(line, sizeof line, format, values);
    va_end(values);
    fprintf(file, "%s %s\n", name, line);
}

/* Begin a phase of the script, to which the following lines belong. */
void stub_mark(const char *phase) { note("mark", "%s", phase); }

/* ---- streams that capture, and graphs ---- */

struct node { void *target; const void *source; size_t bytes; host_function *function; };
struct graph { int id, count; struct node nodes[4096]; };

static struct graph *captured;
static void *capturing_stream;

static int graph_of(void *stream) { return captured && stream == capturing_stream ? captured->id : 0; }

static int forbidden(const char *name) {
    if (!captured) return OK;
    note("forbidden", "call=%s graph=%d", name, captured->id);
    return FORBIDDEN;
}

static void do_node(struct node node) {
    if (node.function) node.function(node.target);
    else memmove(node.target, node.source, node.bytes);
}

static int submit(void *stream, struct node node) {
    if (graph_of(stream)) captured->nodes[captured->count++] = node;
    else do_node(node);
    return OK;
}

int cudaStreamBeginCapture(void *stream, int mode) {
    static int graphs;
    captured = calloc(1, sizeof *captured);
    captured->id = ++graphs;
    capturing_stream = stream;
    note("cudaStreamBeginCapture", "stream=%p", stream);
    return OK;
}

int cudaStreamEndCapture(void *stream, struct graph **graph) {
    *graph = captured;
    captured = NULL;
    note("cudaStreamEndCapture", "stream=%p", stream);
    return OK;
}

int cudaStreamIsCapturing(void *stream, int *status) { return *status = graph_of(stream) != 0, OK; }

int cudaGraphInstantiate(struct graph **executable, struct graph *graph, unsigned long long flags) {
    return *executable = graph, OK;
}

int cudaGraphLaunch(struct graph *graph, void *stream) {
    note("cudaGraphLaunch", "launched=%d stream=%p", graph->id, stream);
    for (int i = 0; i < graph->count; i++) do_node(graph->nodes[i]);
    return OK;
}

int cudaLaunchHostFunc(void *stream, host_function *function, void *argument) {
    note("cudaLaunchHostFunc", "stream=%p graph=%d", stream, graph_of(stream));
    return submit(stream, (struct node){.function = function, .target = argument});
}

/* ---- calls that only succeed ---- */

int stub_succeed(const char *name) {
    note(name, "graph=%d", captured ? captured->id : 0);
    return OK;
}

int stub_create(const char *name, void **handle) {
    static uintptr_t last = 0x1000;
    *handle = (void *)(last += 16);
    return stub_succeed(name);
}

/* These allocate device memory, which a capture forbids. */
int cublasCreate_v2(void **handle) { return forbidden("cublasCreate_v2") ?: stub_create("cublasCreate_v2", handle); }
int cublasLtCreate(void **handle) { return forbidden("cublasLtCreate") ?: stub_create("cublasLtCreate", handle); }
int cudnnCreate(void **handle) { return forbidden("cudnnCreate") ?: stub_create("cudnnCreate", handle); }

/* ---- memory ---- */

static struct block { char *start; size_t bytes; const char *place; } blocks[1 << 16];
static int block_count;

static struct block *block_of(const void *address) {
    for (int i = block_count - 1; i >= 0; i--)
        if ((size_t)((char *)address - blocks[i].start) < blocks[i].bytes) return &blocks[i];
    return NULL;
}

static const char *place_of(const void *address) {
    struct block *block = block_of(address);
    return block ? block->place : "host";
}

static int allocate(const char *name, void **address, size_t bytes, const char *place) {
    if (forbidden(name)) return FORBIDDEN;
    *address = aligned_alloc(256, (bytes + 256) / 256 * 256);
    memset(*address, 0, bytes);
    blocks[block_count++] = (struct block){*address, bytes, place};
    note(name, "bytes=%zu target=%p", bytes, *address);
    return OK;
}

static int release(const char *name, void *address) {
    if (forbidden(name)) return FORBIDDEN;
    struct block *block = block_of(address);
    if (!block) return OK;
    note(name, "bytes=%zu source=%p", block->bytes, address);
    *block = blocks[--block_count];
    free(address);
    return OK;
}

int cudaMalloc(void **address, size_t bytes) { return allocate("cudaMalloc", address, bytes, "device"); }
int cudaMallocHost(void **address, size_t bytes) { return allocate("cudaMallocHost", address, bytes, "pinned"); }
int cudaHostAlloc(void **address, size_t bytes, unsigned flags) {
    return allocate("cudaHostAlloc", address, bytes, "pinned");
}
int cudaFree(void *address) { return release("cudaFree", address); }
int cudaFreeHost(void *address) { return release("cudaFreeHost", address); }
int cudaMemGetInfo(size_t *free_bytes, size_t *total) { return *free_bytes = *total = (size_t)64 << 30, OK; }

struct attributes { int type, device; void *on_device, *on_host; };
int cudaPointerGetAttributes(struct attributes *attributes, void *address) {
    const char *place = place_of(address);
    int type = *place == 'd' ? 2 : *place == 'p' ? 1 : 0;
    *attributes = (struct attributes){type, 0, address, address};
    return OK;
}

/* ---- copies ---- */

int cudaMemcpyAsync(void *target, const void *source, size_t bytes, int kind, void *stream) {
    note("cudaMemcpyAsync", "origin=%s destination=%s bytes=%zu source=%p target=%p stream=%p graph=%d",
         place_of(source), place_of(target), bytes, source, target, stream, graph_of(stream));
    return submit(stream, (struct node){target, source, bytes, NULL});
}

int cudaMemcpy(void *target, const void *source, size_t bytes, int kind) {
    if (forbidden("cudaMemcpy")) return FORBIDDEN;
    note("cudaMemcpy", "origin=%s destination=%s bytes=%zu source=%p target=%p", place_of(source), place_of(target),
         bytes, source, target);
    memmove(target, source, bytes);
    return OK;
}

int cudaMemsetAsync(void *target, int value, size_t bytes, void *stream) {
    note("cudaMemsetAsync", "bytes=%zu target=%p stream=%p graph=%d", bytes, target, stream, graph_of(stream));
    if (!graph_of(stream)) memset(target, value, bytes);
    return OK;
}

int cudaMemset(void *target, int value, size_t bytes) {
    return forbidden("cudaMemset") ?: cudaMemsetAsync(target, value, bytes, NULL);
}

/* ---- waiting ---- */

static int wait(const char *name) { return forbidden(name) ?: stub_succeed(name); }

int cudaDeviceSynchronize(void) { return wait("cudaDeviceSynchronize"); }
int cudaStreamSynchronize(void *stream) { return wait("cudaStreamSynchronize"); }
int cudaStreamQuery(void *stream) { return wait("cudaStreamQuery"); }
int cudaEventSynchronize(void *event) { return wait("cudaEventSynchronize"); }
int cudaEventQuery(void *event) { return wait("cudaEventQuery"); }

/* ---- kernels: the provider registers thousands, each by the address of a host function ---- */

enum { BITS = 18 };
static struct { const void *function; const char *name; } kernels[1 << BITS];

static unsigned place_in_table(const void *function) {
    unsigned at = (uintptr_t)function * 0x9E3779B97F4A7C15u >> (64 - BITS);
    while (kernels[at].function && kernels[at].function != function) at = (at + 1) % (1 << BITS);
    return at;
}

void __cudaRegisterFunction(void **binary, const void *function, char *device_function, const char *name) {
    unsigned at = place_in_table(function);
    kernels[at].function = function;
    kernels[at].name = name;
}

void **__cudaRegisterFatBinary(void *binary) { return binary; }
void __cudaRegisterFatBinaryEnd(void **binary) {}
void __cudaUnregisterFatBinary(void **binary) {}
void __cudaRegisterVar(void) {}
int __cudaGetKernel(const void **kernel, const void *function) { return *kernel = function, OK; }

static int launch(const void *function, dim3 grid, dim3 block, void *stream) {
    note("kernel", "kernel=%s blocks=%u threads=%u stream=%p graph=%d", kernels[place_in_table(function)].name,
         grid.x * grid.y * grid.z, block.x * block.y * block.z, stream, graph_of(stream));
    return OK;
}

int cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, void *stream) {
    return launch(function, grid, block, stream);
}

int __cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, void *stream) {
    return launch(function, grid, block, stream);
}

int cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                                void *stream) {
    return launch(function, grid, block, stream);
}

struct launch_config { dim3 grid, block; size_t shared; void *stream; };
int cudaLaunchKernelExC(const struct launch_config *how, const void *function, void **arguments) {
    return launch(function, how->grid, how->block, how->stream);
}

int cuModuleLoadData(void **module, const void *code) { return stub_create("cuModuleLoadData", module); }
int cuModuleUnload(void *module) { return OK; }

int cuModuleGetFunction(const void **function, void *module, const char *name) {
    *function = strdup(name);
    __cudaRegisterFunction(NULL, *function, NULL, *function);
    return OK;
}

int cuLaunchKernel(const void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared, void *stream, void **arguments, void **extra) {
    return launch(function, (dim3){grid_x, grid_y, grid_z}, (dim3){block_x, block_y, block_z}, stream);
}

/* The configuration that `kernel<<<...>>>` passes to the host function it then calls. */
static struct launch_config pushed;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    pushed = (struct launch_config){grid, block, shared, stream};
    return OK;
}

int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void **stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *stream = pushed.stream;
    return OK;
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) { return *blocks = 2, OK; }
int cudaFuncGetAttributes(void *attributes) { return memset(attributes, 0, 64), OK; }

/* ---- the device ---- */

int cuInit(unsigned flags) { return OK; }
int cuDeviceGetCount(int *count) { return *count = 1, OK; }
int cudaGetDeviceCount(int *count) { return *count = 1, OK; }
int cudaGetDevice(int *device) { return *device = 0, OK; }
int cudaSetDevice(int device) { return OK; }
int cudaDriverGetVersion(int *version) { return *version = 13000, OK; }
int cudaRuntimeGetVersion(int *version) { return *version = 13000, OK; }
int cudaDeviceGetAttribute(int *value, int which) {
    *value = which == 75 ? 9 : 0; /* cudaDevAttrComputeCapabilityMajor */
    return OK;
}
int cudaGetLastError(void) { return OK; }
int cudaPeekAtLastError(void) { return OK; }
const char *cudaGetErrorString(int error) { return error == FORBIDDEN ? "forbidden while a stream captures" : "stub"; }
const char *cudaGetErrorName(int error) { return cudaGetErrorString(error); }

/* The first members of cudaDeviceProp. The rest of its 1008 bytes is zero. */
struct properties {
    char name[256], uuid[16], luid[8];
    unsigned luid_mask;
    size_t memory, shared;
    int registers, warp;
    size_t pitch;
    int threads, block[3], grid[3];
    size_t constants;
    int major, minor;
    size_t alignment, pitch_alignment;
    int multiprocessors;
};

int cudaGetDeviceProperties(struct properties *properties) {
    memset(properties, 0, 1008);
    *properties = (struct properties){
        .name = "stub", .memory = (size_t)64 << 30, .shared = 48 << 10, .registers = 1 << 16, .warp = 32,
        .threads = 1024, .block = {1024, 1024, 64}, .grid = {1 << 30, 65535, 65535}, .major = 9,
        .multiprocessors = 132,
    };
    return OK;
}

int cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version, unsigned long long flags,
                                     int *status) {
    *function = NULL;
    if (status) *status = 1; /* there is no such function */
    return OK;
}

/* ---- cuDNN and cuBLAS: results that the provider uses ---- */

size_t cudnnGetVersion(void) { return 91000; }
const char *cudnnGetErrorString(int status) { return "stub"; }
const char *cublasGetStatusString(int status) { return "stub"; }
const char *cublasGetStatusName(int status) { return "stub"; }
void cudnnGetLastErrorString(char *text, size_t bytes) { snprintf(text, bytes, "stub"); }

/* The provider plans convolutions through this API, which the stub does not imitate. */
int cudnnBackendCreateDescriptor(int type, void **descriptor) { return NOT_SUPPORTED; }

int cudnnDropoutGetStatesSize(void *handle, size_t *bytes) { return *bytes = 64, OK; }

int cudnnGetRNNTempSpaceSizes(void *handle, void *rnn, int mode, void *x, size_t *workspace, size_t *reserve) {
    *workspace = 4096;
    *reserve = 0;
    return OK;
}

/* Every weight has one element, at the start, so that the provider copies weights into place, but few bytes. */
int cudnnGetRNNWeightParams(void *handle, void *rnn, int layer, size_t bytes, void *weights, int id, void *matrix_shape,
                            void **matrix, void *bias_shape, void **bias) {
    *matrix = *bias = weights;
    return OK;
}

int cudnnGetTensorNdDescriptor(void *tensor, int wanted, int *type, int *count, int *sizes, int *strides) {
    *type = 0;
    *count = wanted;
    for (int i = 0; i < wanted; i++) sizes[i] = strides[i] = 1;
    return OK;
}
