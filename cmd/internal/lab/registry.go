package lab

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/google/go-containerregistry/pkg/registry"
)

// Registry is an image registry on loopback, plain HTTP, that can hold the
// download of a layer until it is told to let go.
type Registry struct {
	// Host is its host:port.
	Host string

	server *http.Server
	done   chan struct{}

	mu    sync.Mutex
	holds map[string]*Hold // by the layer's digest
}

// Hold is a download that waits.
type Hold struct {
	// Reached is closed when somebody asks for the layer.
	Reached chan struct{}

	reach, release sync.Once
	released       chan struct{}
}

// Release lets the download, and every later one, go on. It can be called again.
func (h *Hold) Release() { h.release.Do(func() { close(h.released) }) }

// NewRegistry starts a registry; Close ends it.
func NewRegistry() (*Registry, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	r := &Registry{Host: l.Addr().String(), done: make(chan struct{}), holds: map[string]*Hold{}}
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	r.server = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if h := r.hold(req); h != nil {
			h.reach.Do(func() { close(h.Reached) })
			select {
			case <-h.released:
			case <-req.Context().Done():
				return
			}
		}
		inner.ServeHTTP(w, req)
	})}
	go func() {
		defer close(r.done)
		_ = r.server.Serve(l) // ends by Close
	}()
	return r, nil
}

func (r *Registry) hold(req *http.Request) *Hold {
	_, digest, ok := strings.Cut(req.URL.Path, "/blobs/")
	if !ok || req.Method != http.MethodGet {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.holds[digest]
}

// Push stores an image under repository:tag and returns its full reference.
func (r *Registry) Push(ctx context.Context, img v1.Image, repositoryAndTag string) (string, error) {
	ref := r.Host + "/" + repositoryAndTag
	tag, err := name.NewTag(ref, name.Insecure)
	if err != nil {
		return "", fmt.Errorf("image name %q: %w", ref, err)
	}
	return ref, remote.Write(tag, img, remote.WithContext(ctx))
}

// HoldLast holds downloads of the image's last layer from now on.
func (r *Registry) HoldLast(img v1.Image) (*Hold, error) {
	layers, err := img.Layers()
	if err != nil {
		return nil, err
	}
	digest, err := layers[len(layers)-1].Digest()
	if err != nil {
		return nil, err
	}
	h := &Hold{Reached: make(chan struct{}), released: make(chan struct{})}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.holds[digest.String()] = h
	return h, nil
}

// Close ends the registry and every download.
func (r *Registry) Close() error {
	err := r.server.Close()
	<-r.done
	return err
}
