package ctrdtest

import (
	"encoding/pem"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// Scheme is how a registry is reached.
type Scheme int

// The schemes.
const (
	Plain Scheme = iota
	TLS          // with an authority of the registry's own
)

// Registry is one on the loopback, in this process.
type Registry struct {
	// Host is `address:port`.
	Host string
	// CAFile is the authority's certificate of a TLS registry.
	CAFile string

	server *httptest.Server
	mu     sync.Mutex
	gate   chan struct{} // nil: open
	held   chan struct{}
	status int // answer of every request, 0: the real one
	match  string
	pulls  int
}

// StartRegistry starts one, which ends with the test.
func StartRegistry(tb testing.TB, scheme Scheme) *Registry {
	tb.Helper()
	r := &Registry{}
	real := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	handler := http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if status := r.enter(req); status != 0 {
			http.Error(w, "the test says so", status)
			return
		}
		real.ServeHTTP(w, req)
	})
	if scheme == Plain {
		r.server = httptest.NewServer(handler)
	} else {
		r.server = httptest.NewUnstartedServer(handler)
		r.server.Config.ErrorLog = log.New(io.Discard, "", 0) // refused handshakes
		r.server.StartTLS()
		r.CAFile = filepath.Join(tb.TempDir(), "ca.pem")
		block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.server.Certificate().Raw})
		if err := os.WriteFile(r.CAFile, block, 0o600); err != nil {
			tb.Fatal(err)
		}
	}
	r.Host = strings.TrimPrefix(strings.TrimPrefix(r.server.URL, "https://"), "http://")
	tb.Cleanup(func() {
		r.Fail("", 0)
		r.release()
		r.server.CloseClientConnections()
		r.server.Close()
	})
	return r
}

// enter is what every request passes; pushes are left alone.
func (r *Registry) enter(req *http.Request) (status int) {
	if req.Method != http.MethodGet && req.Method != http.MethodHead {
		return 0
	}
	r.mu.Lock()
	if req.Method == http.MethodHead || strings.Contains(req.URL.Path, "/manifests/") {
		r.pulls++
	}
	status, gate, held := r.status, r.gate, r.held
	if !strings.Contains(req.URL.Path, r.match) {
		status = 0
	}
	r.mu.Unlock()
	if gate != nil {
		select {
		case held <- struct{}{}:
		default:
		}
		select {
		case <-gate:
		case <-req.Context().Done():
		}
	}
	return status
}

// Hold holds every read from now on. held gets a value when one has come, and
// release lets them all go.
func (r *Registry) Hold() (held <-chan struct{}, release func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.gate, r.held = make(chan struct{}), make(chan struct{}, 1)
	return r.held, r.release
}

func (r *Registry) release() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.gate != nil {
		close(r.gate)
		r.gate = nil
	}
}

// Fail answers reads whose path contains match with the HTTP status; 0 ends that.
func (r *Registry) Fail(match string, status int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.match, r.status = match, status
}

// Resolves returns how often a manifest was asked for.
func (r *Registry) Resolves() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.pulls
}

// Close ends the registry before the test's end.
func (r *Registry) Close() { r.server.Close() }

// PushIndex stores an index of the images, each under its own platform, and
// returns its reference.
func (r *Registry) PushIndex(tb testing.TB, repository string, imgs ...v1.Image) string {
	tb.Helper()
	ref, err := name.NewTag(r.Host + "/" + repository)
	if err != nil {
		tb.Fatal(err)
	}
	var index v1.ImageIndex = empty.Index
	for _, img := range imgs {
		config, err := img.ConfigFile()
		if err != nil {
			tb.Fatal(err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: config.Platform()}})
	}
	if err := remote.WriteIndex(ref, index, remote.WithTransport(r.server.Client().Transport), remote.WithContext(tb.Context())); err != nil {
		tb.Fatal(err)
	}
	return ref.String()
}

// Push stores the image and returns its reference.
func (r *Registry) Push(tb testing.TB, repository string, img v1.Image) string {
	tb.Helper()
	ref, err := name.NewTag(r.Host + "/" + repository)
	if err != nil {
		tb.Fatal(err)
	}
	if err := remote.Write(ref, img, remote.WithTransport(r.server.Client().Transport), remote.WithContext(tb.Context())); err != nil {
		tb.Fatal(err)
	}
	return ref.String()
}
