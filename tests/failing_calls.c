// Lets calls of one kind fail: loaded with LD_PRELOAD, armed through ctypes, or for a whole process by the variable
// FAILING_CALLS="kind first last errno least folder".
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <malloc.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[4096];  // of the files whose calls count
static char kind = '-';    // 'w' write, 'r' read, 'd' read a directory, 's' sync, 'n' rename, 't' truncate,
                           // 'p' make a thread, 'm' allocate at least `least` bytes, '-' none
static int first, last;    // the calls that fail, counted from 0
static int failure;        // their errno; 0: they do half of their work
static size_t least;
static int seen;
static void (*watcher)(char what, int done, const char *path);

void arm(const char *where, char what, int from, int to, int error, size_t bytes) {
    kind = '-';
    strncpy(folder, where, sizeof folder - 1);
    __atomic_store_n(&seen, 0, __ATOMIC_SEQ_CST);
    first = from, last = to, failure = error, least = bytes, kind = what;
}

// `notice` is called before and after each sync and rename in `folder`
void watch(void (*notice)(char what, int done, const char *path)) { watcher = notice; }

int calls(void) { return seen; }

__attribute__((constructor)) static void arm_by_environment(void) {
    const char *given = getenv("FAILING_CALLS");
    char what, where[4096] = "";
    int from, to, error;
    size_t bytes;
    if (given && sscanf(given, "%c %d %d %d %zu %4095s", &what, &from, &to, &error, &bytes, where) >= 5)
        arm(where, what, from, to, error, bytes);
}

static int inside(const char *path) { return folder[0] && strncmp(path, folder, strlen(folder)) == 0; }

static int counts(char what) {
    if (kind != what) return 0;
    int number = __atomic_fetch_add(&seen, 1, __ATOMIC_SEQ_CST);
    return number >= first && number <= last;
}

static void path_of(int descriptor, char *path, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, size - 1);
    path[length < 0 ? 0 : length] = 0;
}

static int of_descriptor(char what, int descriptor) {
    if (kind != what) return 0;
    char path[4096];
    path_of(descriptor, path, sizeof path);
    return inside(path) && counts(what);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL() do { errno = failure; return -1; } while (0)
#define MOVES(what, name, bytes, ...)                                        \
    if (of_descriptor(what, descriptor)) {                                   \
        if (failure) FAIL();                                                 \
        size = size > 1 ? size / 2 : size;                                   \
    }                                                                        \
    return NEXT(name)(descriptor, bytes, size, ##__VA_ARGS__)

ssize_t write(int descriptor, const void *data, size_t size) { MOVES('w', write, data); }
ssize_t pwrite(int descriptor, const void *data, size_t size, off_t at) { MOVES('w', pwrite, data, at); }
ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t at) { MOVES('w', pwrite64, data, at); }
ssize_t read(int descriptor, void *data, size_t size) { MOVES('r', read, data); }
ssize_t pread(int descriptor, void *data, size_t size, off_t at) { MOVES('r', pread, data, at); }
ssize_t pread64(int descriptor, void *data, size_t size, off64_t at) { MOVES('r', pread64, data, at); }

#define VECTORS(what, name, ...)                                             \
    if (of_descriptor(what, descriptor) && failure) FAIL();                  \
    return NEXT(name)(descriptor, vectors, count, ##__VA_ARGS__)
#define VECTOR int descriptor, const struct iovec *vectors, int count

ssize_t readv(VECTOR) { VECTORS('r', readv); }
ssize_t preadv(VECTOR, off_t at) { VECTORS('r', preadv, at); }
ssize_t preadv64(VECTOR, off64_t at) { VECTORS('r', preadv64, at); }
ssize_t preadv2(VECTOR, off_t at, int flags) { VECTORS('r', preadv2, at, flags); }
ssize_t preadv64v2(VECTOR, off64_t at, int flags) { VECTORS('r', preadv64v2, at, flags); }

ssize_t sendfile(int to, int from, off_t *at, size_t size) {
    if ((of_descriptor('r', from) || of_descriptor('w', to)) && failure) FAIL();
    return NEXT(sendfile)(to, from, at, size);
}
ssize_t sendfile64(int to, int from, off64_t *at, size_t size) {
    if ((of_descriptor('r', from) || of_descriptor('w', to)) && failure) FAIL();
    return NEXT(sendfile64)(to, from, at, size);
}
struct dirent *readdir(DIR *entries) {
    if (of_descriptor('d', dirfd(entries))) return errno = failure, NULL;
    return NEXT(readdir)(entries);
}
struct dirent64 *readdir64(DIR *entries) {
    if (of_descriptor('d', dirfd(entries))) return errno = failure, NULL;
    return NEXT(readdir64)(entries);
}

static int synced(int descriptor, int (*next)(int)) {
    char path[4096];
    path_of(descriptor, path, sizeof path);
    int watched = watcher && inside(path);
    if (watched) watcher('s', 0, path);
    int result = next(descriptor);
    if (watched && result == 0) watcher('s', 1, path);
    return result;
}
int fsync(int descriptor) {
    if (of_descriptor('s', descriptor)) FAIL();
    return synced(descriptor, NEXT(fsync));
}
int fdatasync(int descriptor) {
    if (of_descriptor('s', descriptor)) FAIL();
    return synced(descriptor, NEXT(fdatasync));
}
int ftruncate(int descriptor, off_t size) {
    if (of_descriptor('t', descriptor)) FAIL();
    return NEXT(ftruncate)(descriptor, size);
}
int ftruncate64(int descriptor, off64_t size) {
    if (of_descriptor('t', descriptor)) FAIL();
    return NEXT(ftruncate64)(descriptor, size);
}
int rename(const char *from, const char *to) {
    if (kind == 'n' && inside(from) && counts('n')) FAIL();
    int watched = watcher && inside(from);
    if (watched) watcher('n', 0, from);
    int result = NEXT(rename)(from, to);
    if (watched && result == 0) watcher('n', 1, to);
    return result;
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument) {
    if (counts('p')) return failure;
    return NEXT(pthread_create)(thread, attributes, run, argument);
}

// ---- memory; the names with two underscores are glibc's own

void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);

static int refused(size_t size) { return kind == 'm' && size >= least && counts('m'); }
#define REFUSE() do { errno = ENOMEM; return NULL; } while (0)

void *malloc(size_t size) {
    if (refused(size)) REFUSE();
    return __libc_malloc(size);
}
void *calloc(size_t count, size_t size) {
    if (refused(count * size)) REFUSE();
    return __libc_calloc(count, size);
}
void *realloc(void *old, size_t size) {
    if (refused(size)) REFUSE();
    return __libc_realloc(old, size);
}
void *memalign(size_t boundary, size_t size) {
    if (refused(size)) REFUSE();
    return __libc_memalign(boundary, size);
}
void *aligned_alloc(size_t boundary, size_t size) { return memalign(boundary, size); }
int posix_memalign(void **result, size_t boundary, size_t size) {
    void *made = memalign(boundary, size);
    if (made == NULL) return ENOMEM;
    *result = made;
    return 0;
}
