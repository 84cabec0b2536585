// Package kektest has a key service for tests: the part of HashiCorp Vault's HTTP
// API that package kek speaks, in this process.
package kektest

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/workspaced/workspaced/store/seal"
)

// Token is what Vault lets in.
const Token = "hvs.kektest-0123456789"

// Vault is a transit engine mounted at transit, with the keys one and two. Its
// answers, those to mistakes as well, are the real one's: testdata/vault.json of
// package kek.
type Vault struct {
	*httptest.Server

	mu     sync.Mutex
	keys   map[string]*seal.Local
	around func(http.ResponseWriter, *http.Request, http.Handler)
	calls  int
}

// NewVault starts one, which ends with the test, and sets VAULT_CACERT and
// VAULT_TOKEN for it.
func NewVault(t *testing.T) *Vault {
	t.Helper()
	v := &Vault{keys: map[string]*seal.Local{}}
	for _, name := range []string{"one", "two"} {
		b, err := seal.NewLocal()
		if err != nil {
			t.Fatal(err)
		}
		if v.keys[name], err = seal.Parse(name, b); err != nil {
			t.Fatal(err)
		}
	}
	v.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// All of it is read now: otherwise nobody sees the client go away.
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		v.mu.Lock()
		v.calls++
		around := v.around
		v.mu.Unlock()
		if around != nil {
			around(w, r, http.HandlerFunc(v.serve))
			return
		}
		v.serve(w, r)
	}))
	v.Config.ErrorLog = log.New(io.Discard, "", 0) // handshakes that tests make fail
	v.StartTLS()
	t.Cleanup(v.Close)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	block := &pem.Block{Type: "CERTIFICATE", Bytes: v.Certificate().Raw}
	if err := os.WriteFile(ca, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("VAULT_CACERT", ca)
	t.Setenv("VAULT_TOKEN", Token)
	return v
}

// URI returns that of a key.
func (v *Vault) URI(key string) string {
	return "hcvault://" + v.Listener.Addr().String() + "/transit/keys/" + key
}

// Around has each request from now on done by f, which may call the engine, or not;
// nil: the engine does it.
func (v *Vault) Around(f func(w http.ResponseWriter, r *http.Request, engine http.Handler)) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.around = f
}

// Calls returns how many requests came.
func (v *Vault) Calls() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.calls
}

// Hang is for Around: no answer, until the client or the server is gone.
func Hang(_ http.ResponseWriter, r *http.Request, _ http.Handler) {
	select {
	case <-r.Context().Done():
	case <-time.After(20 * time.Second):
	}
}

func (v *Vault) serve(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("X-Vault-Token") != Token {
		answer(w, http.StatusForbidden, errorsOf("permission denied"))
		return
	}
	rest, ok := strings.CutPrefix(r.URL.Path, "/v1/transit/")
	verb, name, _ := strings.Cut(rest, "/")
	if !ok || verb != "encrypt" && verb != "decrypt" {
		answer(w, http.StatusNotFound, errorsOf(fmt.Sprintf("no handler for route %q. route entry not found.", strings.TrimPrefix(r.URL.Path, "/v1/"))))
		return
	}
	if r.Method != http.MethodPost && r.Method != http.MethodPut {
		answer(w, http.StatusMethodNotAllowed, errorsOf())
		return
	}
	var ask struct {
		Plaintext  []byte `json:"plaintext"`
		Ciphertext string `json:"ciphertext"`
		Associated []byte `json:"associated_data"`
	}
	key := v.keys[name]
	switch err := json.NewDecoder(r.Body).Decode(&ask); {
	case err != nil:
		answer(w, http.StatusBadRequest, errorsOf("missing ciphertext to decrypt"))
	case key == nil && verb == "encrypt": // it is asked by a policy with nothing but update
		answer(w, http.StatusForbidden, errorsOf("1 error occurred:\n\t* permission denied\n\n"))
	case key == nil:
		answer(w, http.StatusBadRequest, errorsOf("encryption key not found"))
	case verb == "encrypt":
		sealed, err := key.EncryptWithContext(r.Context(), ask.Plaintext, ask.Associated)
		if err != nil {
			answer(w, http.StatusInternalServerError, errorsOf("internal error"))
			return
		}
		text := base64.StdEncoding.EncodeToString(sealed)
		answer(w, http.StatusOK, map[string]any{"data": map[string]any{"ciphertext": "vault:v1:" + text, "key_version": 1}})
	default:
		text, ok := strings.CutPrefix(ask.Ciphertext, "vault:v1:")
		if !ok {
			answer(w, http.StatusBadRequest, errorsOf("invalid ciphertext: no prefix"))
			return
		}
		sealed, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			answer(w, http.StatusBadRequest, errorsOf("invalid ciphertext: could not decode base64"))
			return
		}
		plain, err := key.DecryptWithContext(r.Context(), sealed, ask.Associated)
		if err != nil {
			answer(w, http.StatusBadRequest, errorsOf("cipher: message authentication failed"))
			return
		}
		answer(w, http.StatusOK, map[string]any{"data": map[string]any{"plaintext": plain}})
	}
}

func errorsOf(texts ...string) map[string]any {
	if texts == nil {
		texts = []string{}
	}
	return map[string]any{"errors": texts}
}

func answer(w http.ResponseWriter, status int, body map[string]any) {
	b, err := json.Marshal(body)
	if err != nil {
		status = http.StatusInternalServerError
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(b)
}
