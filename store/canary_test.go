package store

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
)

// forms returns how a value could show up in a file.
func forms(v string) [][]byte {
	forms := [][]byte{[]byte(v), []byte(hex.EncodeToString([]byte(v)))}
	// base64 at any alignment: without what depends on the neighbours.
	for shift := range 3 {
		padded := append(make([]byte, shift), v...)
		text := base64.StdEncoding.EncodeToString(padded)
		forms = append(forms, []byte(text[4:len(text)-8]))
	}
	return forms
}

// No value that was ever given to the store is in its files, nor in what it
// says.
func TestContract21_NoPlaintextInTheFiles(t *testing.T) {
	h := newHarness(t)
	var canaries []string
	canary := func() string {
		v := rand.Text() + rand.Text()
		canaries = append(canaries, v)
		return v
	}
	secret := func(key string) SecretValue { return value(key, canary()) }
	with := func(id string, secrets ...SecretValue) Options { // the whole request, values and all
		fingerprint := "request"
		for _, s := range secrets {
			fingerprint += s.Key + s.Value.Reveal()
		}
		return request(id, fingerprint)
	}
	var said []string
	say := func(v any, err error) {
		said = append(said, fmt.Sprintf("%+v %#v %v", v, v, err))
	}

	for i := range 8 {
		id := fmt.Sprint("w", i)
		s := secret("K")
		say(h.CreateWorkspace(ctx, NewWorkspace{ID: id, Secrets: []SecretValue{s, secret("L")}}, with("create"+id, s)))
		for range 3 {
			s := secret("K")
			say(h.UpdateSecrets(ctx, in(id), SecretsUpdate{Set: []SecretValue{s}}, with("set"+id+s.Value.Reveal()[:2], s)))
		}
		g := secret("G")
		say(h.UpdateSecrets(ctx, Scope{}, SecretsUpdate{Set: []SecretValue{g}}, with("global"+id, g)))
		say(h.UpdateSecrets(ctx, in(id), SecretsUpdate{Delete: []string{"L"}}, Options{}))
		// Older versions, in each state.
		for _, scope := range []Scope{in(id), {}} {
			key := map[bool]string{true: "G", false: "K"}[scope.Global()]
			for range 3 {
				s := secret(key)
				say(h.UpdateSecrets(ctx, scope, SecretsUpdate{Set: []SecretValue{s}}, Options{}))
			}
			now := must(h.Secret(scope, key))(t).Version
			say(h.UpdateSecrets(ctx, scope, SecretsUpdate{RollBack: &RollBack{key, now - 1}}, request(fmt.Sprint("back", id, key), "back")))
			say(h.SetVersionState(ctx, scope, key, now, VersionDisabled, request(fmt.Sprint("disable", id, key), "disable")))
			say(h.SetVersionState(ctx, scope, key, now-2, VersionDestroyed, Options{}))
			say(h.UpdateSecrets(ctx, scope, SecretsUpdate{RollBack: &RollBack{key, now}}, Options{}))
			say(h.UpdateSecrets(ctx, scope, SecretsUpdate{RollBack: &RollBack{key, now - 2}}, Options{}))
			versions, _, err := h.ListSecretVersions(scope, key, 0, 0)
			say(versions, err)
		}

		// What fails, or is only tried.
		say(h.UpdateSecrets(ctx, in(id), SecretsUpdate{Set: []SecretValue{secret(DefaultModelEnv)}}, Options{}))
		say(h.UpdateSecrets(ctx, in(id), SecretsUpdate{Set: []SecretValue{secret("K")}}, Options{Etag: "stale"}))
		say(h.UpdateSecrets(ctx, in(id), SecretsUpdate{Set: []SecretValue{secret("K"), secret("K")}}, Options{}))
		say(h.UpdateSecrets(ctx, in("missing"), SecretsUpdate{Set: []SecretValue{secret("K")}}, Options{}))
		say(h.UpdateSecrets(ctx, in(id), SecretsUpdate{Set: []SecretValue{value("K", strings.Repeat(canary(), 2000))}}, Options{}))
		s = secret("K")
		only := with("only"+id, s)
		only.ValidateOnly = true
		say(h.UpdateSecrets(ctx, in(id), SecretsUpdate{Set: []SecretValue{s}}, only))
		say(change(ctx, h.Store, false, func(t *txn) (Result, error) { // written, then rolled back
			r, err := t.updateOwnSecrets(id, &SecretsUpdate{Set: []SecretValue{secret("K")}}, &Options{})
			return r, errors.Join(err, errors.New("no"))
		}))
		say(h.Snapshot(id))
		if i%2 == 0 {
			h.remove(id)
		}
	}
	plain := rand.Text() + rand.Text() // a test of the test: what is not sealed is found
	must(h.UpdateWorkspace(ctx, "w1", func(e *Editable) error { e.Model = plain; return nil }, Options{}))(t)

	var files map[string][]byte
	found := func(v []byte) string {
		for name, content := range files {
			if bytes.Contains(content, v) {
				return filepath.Base(name)
			}
		}
		return ""
	}
	for _, when := range []string{"open", "closed", "opened again"} {
		files = readDir(t, h.cfg.Path)
		if found([]byte(plain)) != "workspaced.db" {
			t.Fatalf("%s: the search finds nothing", when)
		}
		for _, v := range canaries {
			for _, form := range forms(v) {
				if name := found(form); name != "" {
					t.Errorf("%s: %s has a secret, as %q", when, name, form)
				}
			}
			sum := sha256.Sum256([]byte("requestK" + v))
			if name := found(sum[:]); name != "" {
				t.Errorf("%s: %s has a request's fingerprint, to try values against", when, name)
			}
			for _, text := range said {
				if strings.Contains(text, v) {
					t.Fatalf("it was said: %s", text)
				}
			}
		}
		switch when {
		case "open":
			h.close()
		case "closed":
			h.open()
		}
	}
}
