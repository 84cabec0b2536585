package store

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/workspaced/workspaced/store/seal/canary"
)

// No value that was ever given to the store is in its files, nor in what it
// says.
func TestContract21_NoPlaintextInTheFiles(t *testing.T) {
	h := newHarness(t)
	canaries := canary.New()
	var values []string
	next := func() string {
		values = append(values, canaries.Value(fmt.Sprint("secret ", len(values))))
		return values[len(values)-1]
	}
	secret := func(key string) SecretValue { return value(key, next()) }
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
		say(h.UpdateSecrets(ctx, in(id), SecretsUpdate{Set: []SecretValue{value("K", strings.Repeat(next(), 3000))}}, Options{}))
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
	// A test of the test: what is not sealed is found.
	plain := canaries.Value("plain")
	must(h.UpdateWorkspace(ctx, "w1", func(e *Editable) error { e.Model = plain; return nil }, Options{}))(t)

	for _, when := range []string{"open", "closed", "opened again", "rotated"} {
		search := canary.Search{Set: canaries}
		if err := search.Dir(filepath.Dir(h.cfg.Path)); err != nil {
			t.Fatal(err)
		}
		if want := (canary.Hit{Name: "plain", Form: "as it is", Where: h.cfg.Path}); !slices.Contains(search.Hits, want) {
			t.Fatalf("%s: the search finds nothing", when)
		}
		for _, hit := range search.Hits {
			if hit.Name != "plain" {
				t.Errorf("%s: %s", when, hit)
			}
		}
		files := readDir(t, h.cfg.Path)
		for _, v := range values {
			sum := sha256.Sum256([]byte("requestK" + v))
			for name, content := range files {
				if bytes.Contains(content, sum[:]) {
					t.Errorf("%s: %s has a request's fingerprint, to try values against", when, name)
				}
			}
		}
		for _, text := range said {
			if hits := canaries.Find([]byte(text)); hits != nil {
				t.Fatalf("it was said: %v, in %s", hits, text)
			}
		}
		switch when {
		case "open":
			h.close()
		case "closed":
			h.open()
		case "opened again":
			say(h.RotateKey(ctx, with("rotate")))
			h.keptUp()
			say(h.Keys(ctx))
		}
	}
}
