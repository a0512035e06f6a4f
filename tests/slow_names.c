/* Preloaded: names that end in ".slow" are looked up for a minute, as where no name server answers. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <string.h>
#include <unistd.h>

typedef int look_up(const char *, const char *, const struct addrinfo *, struct addrinfo **);

int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints,
                struct addrinfo **found) {
    size_t length = name ? strlen(name) : 0;
    if (length >= 5 && !strcmp(name + length - 5, ".slow")) {
        sleep(60);
        return EAI_AGAIN;
    }
    look_up *real = (look_up *)dlsym(RTLD_NEXT, "getaddrinfo");
    return real(name, service, hints, found);
}
