package main

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/workspaced/workspaced/store"
	"github.com/workspaced/workspaced/store/seal"
	"github.com/workspaced/workspaced/store/seal/kek/kektest"
)

// testLog is a log that can be read.
func testLog(t *testing.T) (*slog.Logger, *syncBuffer) {
	t.Helper()
	out := new(syncBuffer)
	return slog.New(slog.NewTextHandler(out, nil)), out
}

// waitKey sets how long the first wait for a key service is.
func waitKey(t *testing.T, d time.Duration) {
	t.Helper()
	first, longest := firstKeyWait, longestKeyWait
	firstKeyWait, longestKeyWait = d, d
	t.Cleanup(func() { firstKeyWait, longestKeyWait = first, longest })
}

// keyed is a configuration whose database is in a directory of its own.
func keyed(t *testing.T, keyURI, previous string) config {
	t.Helper()
	cfg := defaultConfig()
	cfg.DataDir, cfg.KeyURI, cfg.PreviousKeyURI = t.TempDir(), keyURI, previous
	if err := cfg.checkKeys(); err != nil {
		t.Fatal(err)
	}
	return cfg
}

// opens opens the store as the daemon does, and closes it.
func opens(t *testing.T, cfg config) error {
	t.Helper()
	log, _ := testLog(t)
	st, err := openStore(t.Context(), cfg, log, nil)
	if err != nil {
		return err
	}
	return st.Close()
}

// A key service that comes up after us is waited for: each attempt is logged, the
// service manager is told to wait, and nothing is made before.
func TestOpenStore_WaitsForTheKeyService(t *testing.T) {
	waitKey(t, 10*time.Millisecond)
	v := kektest.NewVault(t)
	notified := listenNotify(t, filepath.Join(t.TempDir(), "notify"))
	v.Around(func(w http.ResponseWriter, r *http.Request, engine http.Handler) {
		if v.Calls() < 3 {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		engine.ServeHTTP(w, r)
	})
	cfg := keyed(t, v.URI("one"), "")
	log, out := testLog(t)
	st, err := openStore(t.Context(), cfg, log, nil)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := st.Close(); err != nil {
		t.Error(err)
	}
	text := out.String()
	for _, want := range []string{"attempt=1", "attempt=2", "sealed, or not ready", "has given the key"} {
		if !strings.Contains(text, want) {
			t.Errorf("the log has no %q:\n%s", want, text)
		}
	}
	if strings.Contains(text, kektest.Token) {
		t.Errorf("the log has the token:\n%s", text)
	}
	if got := <-notified; !strings.Contains(got, "EXTEND_TIMEOUT_USEC=") || !strings.Contains(got, "STATUS=Waiting for the key service") {
		t.Errorf("the service manager was told %q", got)
	}
	if token := os.Getenv("VAULT_TOKEN"); token != "" {
		t.Error("the token is still in the environment")
	}
}

// A stop ends the wait at once, while a key service hangs and between two attempts.
func TestOpenStore_StopEndsTheWait(t *testing.T) {
	for name, around := range map[string]func(http.ResponseWriter, *http.Request, http.Handler){
		"hangs": kektest.Hang,
		"fails": func(w http.ResponseWriter, _ *http.Request, _ http.Handler) { w.WriteHeader(http.StatusBadGateway) },
	} {
		t.Run(name, func(t *testing.T) {
			waitKey(t, time.Hour)
			v := kektest.NewVault(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			v.Around(func(w http.ResponseWriter, r *http.Request, engine http.Handler) {
				time.AfterFunc(50*time.Millisecond, cancel)
				around(w, r, engine)
			})
			cfg := keyed(t, v.URI("one"), "")
			log, _ := testLog(t)
			begun := time.Now()
			if st, err := openStore(ctx, cfg, log, nil); err == nil {
				_ = st.Close()
				t.Error("it is open")
			}
			if d := time.Since(begun); d > 4*time.Second { // less than a call may take
				t.Errorf("it took %v", d)
			}
			if entries, err := os.ReadDir(cfg.DataDir); err != nil || len(entries) > 0 {
				t.Errorf("it made %v, %v", entries, err)
			}
		})
	}
}

// What a key service refuses is said at once.
func TestOpenStore_RefusedKey(t *testing.T) {
	v := kektest.NewVault(t)
	t.Setenv("VAULT_TOKEN", "hvs.of-somebody-else")
	cfg := keyed(t, v.URI("one"), "")
	err := opens(t, cfg)
	if err == nil || !strings.Contains(err.Error(), cfg.KeyURI+" does not give: permission denied (HTTP 403)") || strings.Contains(err.Error(), "hvs.") {
		t.Errorf("got %v", err)
	}
	if n := v.Calls(); n != 1 {
		t.Errorf("it was asked %d times", n)
	}
}

// Another key: with the old one's URI the data keys change over, without it both are
// named and nothing changes.
func TestOpenStore_ChangesKeys(t *testing.T) {
	v := kektest.NewVault(t)
	token := func() { t.Setenv("VAULT_TOKEN", kektest.Token) } // for the next start
	local, err := seal.NewLocal()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("KEK_TEST", string(local))
	t.Setenv("KEK_AGAIN", string(local))
	cfg := keyed(t, "", "")
	file := cfg.KeyURI
	log, _ := testLog(t)
	st, err := openStore(t.Context(), cfg, log, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, err = st.CreateWorkspace(t.Context(), store.NewWorkspace{
		ID: "w", Spec: store.Spec{Image: "registry.invalid/app:1"}, Secrets: []store.SecretValue{{Key: "K", Value: seal.New([]byte("v"))}},
	}, store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
	refused := func(want ...string) {
		t.Helper()
		before := content(t, cfg.DataDir)
		token()
		err := opens(t, cfg)
		for _, want := range want {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("with %s, previously %q: got %v, want something with %q", cfg.KeyURI, cfg.PreviousKeyURI, err, want)
			}
		}
		if after := content(t, cfg.DataDir); len(after) != len(before) || after[cfg.database()] != before[cfg.database()] {
			t.Errorf("it changed something: %v, %v", before, after)
		}
	}
	accepted := func() {
		t.Helper()
		token()
		if err := opens(t, cfg); err != nil {
			t.Errorf("with %s, previously %q: %v", cfg.KeyURI, cfg.PreviousKeyURI, err)
		}
	}

	cfg.KeyURI = v.URI("one")
	refused("key file "+cfg.keyFile(), "Vault key "+v.URI("one"), "previous_key_uri")
	cfg.PreviousKeyURI = file
	accepted()
	if err := os.Remove(cfg.keyFile()); err != nil { // it is not needed any more
		t.Fatal(err)
	}
	refused("previous_key_uri", cfg.keyFile(), "remove the setting")
	cfg.PreviousKeyURI = ""
	accepted()

	cfg.KeyURI, cfg.PreviousKeyURI = "env://KEK_TEST", v.URI("two")
	refused("Vault key "+v.URI("one"), "environment variable KEK_TEST") // the wrong old one
	t.Setenv("KEK_TEST", string(local))
	cfg.PreviousKeyURI = v.URI("one")
	v.Around(func(w http.ResponseWriter, _ *http.Request, _ http.Handler) { w.WriteHeader(http.StatusForbidden) })
	refused("HTTP 403")
	v.Around(nil)
	t.Setenv("KEK_TEST", string(local))
	accepted()
	if _, there := os.LookupEnv("KEK_TEST"); there {
		t.Error("the key is still in the environment")
	}
	// A key file again, which is made for that.
	cfg.KeyURI, cfg.PreviousKeyURI = file, "env://KEK_AGAIN"
	accepted()
	cfg.PreviousKeyURI = ""
	accepted()

	key, err := seal.Load(cfg.keyFile())
	if err != nil {
		t.Fatal(err)
	}
	st, err = store.Open(store.Config{Path: cfg.database(), KEK: key})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	if secrets, _, err := st.ListSecrets(store.Scope{WorkspaceID: "w"}, "", 10); err != nil || len(secrets) != 1 {
		t.Errorf("got %v, %v", secrets, err)
	}
}

// While the daemon runs, a key service that is away keeps nothing but a rotation
// from being done.
func TestOpenStore_KeyServiceGoesAway(t *testing.T) {
	v := kektest.NewVault(t)
	log, out := testLog(t)
	st, err := openStore(t.Context(), keyed(t, v.URI("one"), ""), log, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	v.Close()
	asked := v.Calls()
	_, err = st.CreateWorkspace(t.Context(), store.NewWorkspace{
		ID: "w", Spec: store.Spec{Image: "registry.invalid/app:1"}, Secrets: []store.SecretValue{{Key: "K", Value: seal.New([]byte("v"))}},
	}, store.Options{})
	if err != nil || v.Calls() != asked {
		t.Errorf("a secret was set: %v, and asked for %d times", err, v.Calls()-asked)
	}
	if _, err := st.RotateKey(t.Context(), store.Options{}); !errors.Is(err, store.ErrKEK) {
		t.Errorf("a rotation: %v", err)
	}
	// The caller is told to look there.
	if !strings.Contains(out.String(), "connection refused") {
		t.Errorf("the log does not say why:\n%s", out)
	}
}

// What is generated is a key, and another one each time.
func TestGenerateKey(t *testing.T) {
	var one, two strings.Builder
	if err := run(t.Context(), []string{"generate-key"}, stdio{out: &one, err: &two}); err != nil {
		t.Fatal(err)
	}
	if err := run(t.Context(), []string{"generate-key"}, stdio{out: &two, err: &two}); err != nil {
		t.Fatal(err)
	}
	if _, err := seal.Parse("it", []byte(one.String())); err != nil || one.String() == two.String() {
		t.Errorf("not a key, or not a new one: %v", err)
	}
}
