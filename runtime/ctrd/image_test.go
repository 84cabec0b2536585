package ctrd_test

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/ctrd"
	"github.com/workspaced/workspaced/runtime/ctrd/ctrdtest"
)

func TestPull(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		e := ctrdtest.NewEnv(t, c)
		plain, secure := ctrdtest.StartRegistry(t, ctrdtest.Plain), ctrdtest.StartRegistry(t, ctrdtest.TLS)
		certs := t.TempDir()
		img := ctrdtest.TestImage(t)
		digest, err := img.Digest()
		if err != nil {
			t.Fatal(err)
		}
		hostDir := filepath.Join(certs, strings.Replace(secure.Host, ":", "_", 1)+"_")
		if err := os.MkdirAll(hostDir, 0o755); err != nil {
			t.Fatal(err)
		}
		ca, err := os.ReadFile(secure.CAFile)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(hostDir, "ca.crt"), ca, 0o600); err != nil {
			t.Fatal(err)
		}
		tests := map[string]struct {
			registry *ctrdtest.Registry
			config   ctrd.Registries
			want     string // in the error's message
		}{
			"plain, as configured":        {plain, ctrd.Registries{PlainHTTP: []string{plain.Host}}, ""},
			"plain, on the loopback":      {plain, ctrd.Registries{}, ""},
			"TLS with its authority":      {secure, ctrd.Registries{CAFiles: []string{secure.CAFile}}, ""},
			"TLS with certs.d":            {secure, ctrd.Registries{CertsDir: certs}, ""},
			"TLS of an unknown authority": {secure, ctrd.Registries{}, "certificate is not trusted"},
			"TLS taken for plain":         {secure, ctrd.Registries{PlainHTTP: []string{secure.Host}}, "HTTP 400"},
		}
		for name, test := range tests {
			t.Run(name, func(t *testing.T) {
				d := e.NewDriver(t, func(cfg *ctrd.Config) { cfg.Registries = test.config })
				ref := test.registry.Push(t, "image:"+strings.ReplaceAll(strings.ReplaceAll(name, " ", "-"), ",", ""), img)
				got, err := d.EnsureImage(t.Context(), ref)
				if test.want != "" {
					wantReason(t, err, runtime.ReasonImagePullFailed, test.want, ref)
					return
				}
				if err != nil || got != digest.String() {
					t.Fatalf("digest %q, %v, want %s", got, err, digest)
				}
				// What is there is not looked for again.
				asked := test.registry.Resolves()
				if again, err := d.EnsureImage(t.Context(), ref); err != nil || again != got || test.registry.Resolves() != asked {
					t.Errorf("the second time: %q, %v, %d requests", again, err, test.registry.Resolves()-asked)
				}
			})
		}
	})
}

func TestPullFailures(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		e := ctrdtest.NewEnv(t, c)
		r := ctrdtest.StartRegistry(t, ctrdtest.Plain)
		gone := ctrdtest.StartRegistry(t, ctrdtest.Plain)
		gone.Close()
		d := e.NewDriver(t, func(cfg *ctrd.Config) { cfg.Registries.PlainHTTP = []string{r.Host, gone.Host} })
		ref := r.Push(t, "image:1", ctrdtest.TestImage(t))
		foreign := r.PushIndex(t, "foreign:1", ctrdtest.BuildImage(t, v1.ConfigFile{Architecture: "mips64le"}))
		tests := map[string]struct {
			ref    string
			match  string
			status int
			reason runtime.Reason
			text   string
		}{
			"no such image":      {r.Host + "/none:1", "", 0, runtime.ReasonImageNotFound, "knows no image"},
			"server error":       {ref, "/manifests/", http.StatusInternalServerError, runtime.ReasonImagePullFailed, "HTTP 500"},
			"a layer's error":    {ref, "/blobs/", http.StatusServiceUnavailable, runtime.ReasonImagePullFailed, "HTTP 503"},
			"a layer is missing": {ref, "/blobs/", http.StatusNotFound, runtime.ReasonImagePullFailed, "missing in the registry"},
			"forbidden":          {ref, "/manifests/", http.StatusForbidden, runtime.ReasonImagePullFailed, "HTTP 403"},
			"no registry":        {gone.Host + "/image:1", "", 0, runtime.ReasonImagePullFailed, "connection refused"},
			"another machine's":  {foreign, "", 0, runtime.ReasonImageInvalid, "no manifest for this machine"},
			"again, now present": {foreign, "", 0, runtime.ReasonImageInvalid, "no manifest for this machine"},
			"bad reference":      {"image@sha256:12", "", 0, runtime.ReasonImageInvalid, "image@sha256:12"},
		}
		for name, test := range tests {
			t.Run(name, func(t *testing.T) {
				r.Fail(test.match, test.status)
				defer r.Fail("", 0)
				_, err := d.EnsureImage(t.Context(), test.ref)
				t.Log(err)
				wantReason(t, err, test.reason, test.text, test.ref)
			})
		}
		// None of that stands in the way of the next try.
		if _, err := d.EnsureImage(t.Context(), ref); err != nil {
			t.Errorf("afterwards: %v", err)
		}
		if leaks := e.Leaks(t, nil); len(leaks) != 0 {
			t.Errorf("left: %q", leaks)
		}
	})
}

func TestPullIsShared(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		e := ctrdtest.NewEnv(t, c)
		r := ctrdtest.StartRegistry(t, ctrdtest.Plain)
		d := e.NewDriver(t, func(cfg *ctrd.Config) { cfg.Registries.PlainHTTP = []string{r.Host} })
		ref := r.Push(t, "image:1", ctrdtest.TestImage(t))
		before := r.Resolves()
		held, release := r.Hold()

		leaving, leave := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		var leaves error
		wg.Go(func() { _, leaves = d.EnsureImage(leaving, ref) })
		receive(t, held, "the pull")
		const n = 4
		var errs [n]error
		for i := range n {
			wg.Go(func() { _, errs[i] = d.EnsureImage(t.Context(), ref) })
		}
		leave()
		release()
		wg.Wait()
		if leaves != nil && !errors.Is(leaves, context.Canceled) {
			t.Errorf("who left: %v", leaves)
		}
		if err := errors.Join(errs[:]...); err != nil {
			t.Errorf("who stayed: %v", err)
		}
		// One HEAD and one GET of the manifest a pull, and a second pull at most for
		// those who came when the first one had lost its last caller.
		if asked := r.Resolves() - before; asked > 4 {
			t.Errorf("%d requests for the manifest", asked)
		}
	})
}

// A caller who leaves is not held by a registry that hangs; another image's
// pull isn't either.
func TestContract03_HungPullHoldsNobody(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		e := ctrdtest.NewEnv(t, c)
		hung, good := ctrdtest.StartRegistry(t, ctrdtest.Plain), ctrdtest.StartRegistry(t, ctrdtest.Plain)
		d := e.NewDriver(t, func(cfg *ctrd.Config) { cfg.Registries.PlainHTTP = []string{hung.Host, good.Host} })
		bad := hung.Push(t, "image:1", ctrdtest.TestImage(t))
		ref := good.Push(t, "image:1", ctrdtest.TestImage(t))
		held, _ := hung.Hold()
		ctx, cancel := context.WithCancel(t.Context())
		ends := make(chan error, 1)
		go func() {
			_, err := d.EnsureImage(ctx, bad)
			ends <- err
		}()
		receive(t, held, "the pull")
		if _, err := d.EnsureImage(t.Context(), ref); err != nil {
			t.Errorf("another image: %v", err)
		}
		cancel()
		if err := receive(t, ends, "the caller's end"); !errors.Is(err, context.Canceled) {
			t.Errorf("who left: %v", err)
		}
		late, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		_, err := d.EnsureImage(late, bad)
		wantReason(t, err, runtime.ReasonTimeout, bad)
		d.Close() // ends within its own deadline, with the registry still hung
	})
}

func receive[T any](t *testing.T, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(30 * time.Second):
		t.Fatalf("%s does not come", what)
		panic("unreachable")
	}
}

func TestImport(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		e := ctrdtest.NewEnv(t, c)
		d := e.NewDriver(t, nil)
		names, err := d.ImportFile(t.Context(), ctrdtest.SaveImage(t, "demo:1", ctrdtest.TestImage(t)))
		if err != nil || len(names) != 1 || names[0] != "docker.io/library/demo:1" {
			t.Errorf("names %q, %v", names, err)
		}
		// The short name means the same image.
		for _, ref := range []string{"demo:1", "docker.io/library/demo:1"} {
			if _, err := d.EnsureImage(t.Context(), ref); err != nil {
				t.Errorf("%s: %v", ref, err)
			}
		}
		_, err = d.ImportImage(t.Context(), strings.NewReader("this is no tar file at all, "+strings.Repeat("x", 2000)))
		wantReason(t, err, runtime.ReasonImageInvalid, "archive")
		_, err = d.ImportFile(t.Context(), "/no/such/file.tar")
		wantReason(t, err, runtime.ReasonImageInvalid, "no such file")
		_, err = d.ImportFile(t.Context(), ctrdtest.SaveImage(t, "foreign:1", ctrdtest.BuildImage(t, v1.ConfigFile{Architecture: "mips64le"})))
		wantReason(t, err, runtime.ReasonImageInvalid, "for this machine")
		if leaks := e.Leaks(t, nil); len(leaks) != 0 {
			t.Errorf("left: %q", leaks)
		}
	})
}

// A registry's name that nobody knows is not containerd's failure.
func TestPullFromUnknownHost(t *testing.T) {
	if _, err := net.DefaultResolver.LookupHost(t.Context(), "registry.invalid"); err == nil {
		t.Skip("NOT TESTED: this machine's resolver knows every name")
	}
	c := ctrdtest.StartContainerd(t, ctrdtest.System)
	e := ctrdtest.NewEnv(t, c)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	_, err := e.NewDriver(t, nil).EnsureImage(ctx, "registry.invalid/image:1")
	wantReason(t, err, runtime.ReasonImagePullFailed, "registry.invalid")
}
