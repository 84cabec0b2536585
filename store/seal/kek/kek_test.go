package kek_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/workspaced/workspaced/store/seal"
	"github.com/workspaced/workspaced/store/seal/kek"
	"github.com/workspaced/workspaced/store/seal/kek/kektest"
)

var plain = bytes.Repeat([]byte("data keys: 0123456789 abcdefghij"), 32) // 1 KiB: MaxKeys of them

// place is where a KEK is kept, in a test.
type place struct {
	open   func(t *testing.T, key string) (seal.KEK, error)             // the keys one, two and, if remote, none
	remote *remote                                                      // nil: it is on this machine
	opened func(t *testing.T, ctx context.Context, key string) seal.KEK // as open, to end with ctx
}

// remote is a key service that can be made to fail.
type remote struct {
	secrets []string                   // that no error may have in it
	fault   func(fault string)         // what it does with every request from now on; empty: what it should
	stop    func()                     // it is gone
	asked   func() (n int, other bool) // how often it was asked; whether another host was
}

func TestKEKs(t *testing.T) {
	for name, setUp := range map[string]func(t *testing.T) place{
		"file": filePlace, "env": envPlace, "credential": credentialPlace,
		"hcvault": vaultPlace, "aws-kms": awsPlace, "gcp-kms": gcpPlace,
	} {
		t.Run(name, func(t *testing.T) {
			p := setUp(t)
			testWraps(t, must(p.open(t, "one"))(t), must(p.open(t, "two"))(t))
			if p.remote != nil {
				testFaults(t, p)
			}
		})
	}
}

// testWraps is what every KEK does.
func testWraps(t *testing.T, one, two seal.KEK) {
	t.Helper()
	ctx, associated := t.Context(), []byte("workspaced data keys of a database")
	wrapped, err := one.EncryptWithContext(ctx, plain, associated)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(wrapped, plain[:16]) {
		t.Error("what is wrapped is in plaintext")
	}
	again, err := one.EncryptWithContext(ctx, plain, associated)
	if err != nil || bytes.Equal(again, wrapped) {
		t.Errorf("wrapped twice is the same, or %v", err)
	}
	if got, err := one.DecryptWithContext(ctx, wrapped, associated); err != nil || !bytes.Equal(got, plain) {
		t.Fatalf("got %q, %v", got, err)
	}
	short, err := one.EncryptWithContext(ctx, []byte{0}, associated)
	if got, err2 := one.DecryptWithContext(ctx, short, associated); err != nil || err2 != nil || !bytes.Equal(got, []byte{0}) {
		t.Errorf("one byte: got %q, %v, %v", got, err, err2)
	}
	flipped := bytes.Clone(wrapped)
	flipped[len(flipped)-9] ^= 1
	for name, c := range map[string]struct {
		kek                 seal.KEK
		wrapped, associated []byte
	}{
		"another key":                {two, wrapped, associated},
		"other associated data":      {one, wrapped, []byte("of another database")},
		"no associated data":         {one, wrapped, nil},
		"damaged":                    {one, flipped, associated},
		"cut off":                    {one, wrapped[:len(wrapped)-20], associated},
		"another kind of KEK's":      {one, []byte("\x01wrapped by something else"), associated},
		"another kind's, in letters": {one, []byte("vault:v1:d3JhcHBlZCBieSBzb21ldGhpbmcgZWxzZQ=="), associated},
		"nothing":                    {one, nil, associated},
	} {
		if got, err := c.kek.DecryptWithContext(ctx, c.wrapped, c.associated); !errors.Is(err, seal.ErrOpen) {
			t.Errorf("%s: got %q, %v, want ErrOpen", name, got, err)
		}
	}
	if one.Name() == "" || one.Name() == two.Name() {
		t.Errorf("names are %q and %q", one.Name(), two.Name())
	}
}

// testFaults is what goes wrong with key services alone.
func testFaults(t *testing.T, p place) {
	t.Helper()
	associated := []byte("associated")
	one := must(p.open(t, "one"))(t)
	wrapped := must(one.EncryptWithContext(t.Context(), plain, associated))(t)
	both := func(t *testing.T, key seal.KEK, ctx context.Context, want error) {
		t.Helper()
		for verb, do := range map[string]func() ([]byte, error){
			"wrap":   func() ([]byte, error) { return key.EncryptWithContext(ctx, plain, associated) },
			"unwrap": func() ([]byte, error) { return key.DecryptWithContext(ctx, wrapped, associated) },
		} {
			begun := time.Now()
			got, err := do()
			if !errors.Is(err, want) || got != nil {
				t.Errorf("%s: got %q, %v, want %v", verb, got, err, want)
			}
			if d := time.Since(begun); d > 3*time.Second {
				t.Errorf("%s took %v", verb, d)
			}
			if err != nil {
				p.silent(t, err, wrapped)
				t.Logf("%s: %v", verb, err)
			}
		}
	}
	for fault, want := range map[string]error{
		"hang": kek.ErrUnavailable, "403": kek.ErrDenied, "404": kek.ErrNoKey, "500": kek.ErrUnavailable, "503": kek.ErrUnavailable,
		"429": kek.ErrUnavailable, "garbage": kek.ErrUnavailable, "empty": kek.ErrUnavailable, "redirect": kek.ErrRefused, "400": kek.ErrRefused,
	} {
		t.Run(fault, func(t *testing.T) {
			isGRPC := strings.HasPrefix(one.Name(), "Google")
			if fault == "redirect" && isGRPC {
				return // it has none
			}
			p.remote.fault(fault)
			defer p.remote.fault("")
			if fault == "400" && isGRPC { // for unwrap it is how it says ErrOpen
				if _, err := one.EncryptWithContext(t.Context(), plain, associated); !errors.Is(err, kek.ErrRefused) {
					t.Errorf("wrap: got %v", err)
				}
				return
			}
			key := one
			if fault == "hang" || fault == "503" { // gRPC repeats the latter
				key = kek.WithTimeout(one, 200*time.Millisecond)
			}
			both(t, key, t.Context(), want)
			if _, other := p.remote.asked(); other {
				t.Error("another host was asked")
			}
		})
	}
	t.Run("cancelled", func(t *testing.T) {
		p.remote.fault("hang")
		defer p.remote.fault("")
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(50*time.Millisecond, cancel)
		both(t, one, ctx, context.Canceled)
		ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		both(t, one, ctx, context.DeadlineExceeded)
	})
	t.Run("ended", func(t *testing.T) {
		p.remote.fault("hang")
		defer p.remote.fault("")
		ctx, cancel := context.WithCancel(t.Context())
		key := p.opened(t, ctx, "one")
		time.AfterFunc(50*time.Millisecond, cancel)
		both(t, key, t.Context(), context.Canceled)
	})
	t.Run("no such key", func(t *testing.T) {
		none := must(p.open(t, "none"))(t)
		_, err := none.EncryptWithContext(t.Context(), plain, associated)
		if !errors.Is(err, kek.ErrNoKey) && !errors.Is(err, kek.ErrDenied) { // Vault does not tell the one from the other
			t.Errorf("wrap: got %v", err)
		}
		p.silent(t, err, wrapped)
		if _, err = none.DecryptWithContext(t.Context(), wrapped, associated); !errors.Is(err, kek.ErrNoKey) {
			t.Errorf("unwrap: got %v", err)
		}
		p.silent(t, err, wrapped)
	})
	// Who may wrap only must not learn of it when nothing can be unwrapped any more.
	t.Run("may not unwrap", func(t *testing.T) {
		p.remote.fault("no decrypt")
		defer p.remote.fault("")
		if got, err := one.EncryptWithContext(t.Context(), plain, associated); !errors.Is(err, kek.ErrDenied) || got != nil {
			t.Errorf("wrap: got %q, %v", got, err)
		}
	})
	t.Run("another plaintext", func(t *testing.T) {
		p.remote.fault("other plaintext")
		defer p.remote.fault("")
		if got, err := one.EncryptWithContext(t.Context(), plain, associated); !errors.Is(err, kek.ErrUnavailable) || got != nil {
			t.Errorf("wrap: got %q, %v", got, err)
		}
	})
	t.Run("healed", func(t *testing.T) {
		if got, err := one.DecryptWithContext(t.Context(), wrapped, associated); err != nil || !bytes.Equal(got, plain) {
			t.Errorf("got %q, %v", got, err)
		}
	})
	// Last, for it does not come back.
	t.Run("gone", func(t *testing.T) {
		p.remote.stop()
		both(t, kek.WithTimeout(one, 300*time.Millisecond), t.Context(), kek.ErrUnavailable)
	})
	for _, format := range []string{"%v", "%+v", "%#v", "%s", "%q"} {
		p.silent(t, fmt.Errorf("%s", fmt.Sprintf(format, one)), wrapped)
	}
}

// silent checks that an error tells nothing, in the forms that these protocols know.
func (p place) silent(t *testing.T, err error, wrapped []byte) {
	t.Helper()
	text := fmt.Sprintf("%v %+v", err, err)
	for _, secret := range append([]string{string(plain[:24]), string(wrapped[:24])}, p.remote.secrets...) {
		for _, form := range []string{secret, base64.StdEncoding.EncodeToString([]byte(secret))[:20], hex.EncodeToString([]byte(secret))} {
			if strings.Contains(text, form) {
				t.Errorf("there is a secret in %q", text)
			}
		}
	}
}

func filePlace(t *testing.T) place {
	dir := t.TempDir()
	return place{open: func(t *testing.T, key string) (seal.KEK, error) {
		return kek.Open(t.Context(), kek.FileURI(filepath.Join(dir, key)), true)
	}}
}

func newKeyset(t *testing.T) string { return string(must(seal.NewLocal())(t)) }

func envPlace(t *testing.T) place {
	t.Setenv("KEK_one", newKeyset(t))
	t.Setenv("KEK_two", newKeyset(t))
	return place{open: func(t *testing.T, key string) (seal.KEK, error) {
		return kek.Open(t.Context(), "env://KEK_"+key, false)
	}}
}

func credentialPlace(t *testing.T) place {
	dir := t.TempDir()
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	writeFile(t, filepath.Join(dir, "one"), newKeyset(t), 0o400)
	writeFile(t, filepath.Join(dir, "two"), newKeyset(t), 0o400)
	return place{open: func(t *testing.T, key string) (seal.KEK, error) {
		return kek.Open(t.Context(), "credential://"+key, false)
	}}
}

// httpFault is what a key service over HTTP does when it fails. Errors quote all
// that they were told.
func httpFault(fault, elsewhere string, w http.ResponseWriter, r *http.Request, engine http.Handler, isDecrypt bool) {
	body, _ := io.ReadAll(r.Body)
	r.Body = io.NopCloser(bytes.NewReader(body))
	quote := fmt.Sprintf(`{"errors": [%q], "__type": "Unknown", "message": %q}`, fmt.Sprint(string(body), r.Header), fmt.Sprint(string(body), r.Header))
	var status int
	switch fault {
	case "hang":
		kektest.Hang(w, r, engine)
	case "garbage":
		_, _ = fmt.Fprintf(w, "<html>%s</html>", quote)
	case "empty":
		_, _ = fmt.Fprint(w, "{}")
	case "redirect":
		http.Redirect(w, r, elsewhere+r.URL.Path, http.StatusTemporaryRedirect)
	case "no decrypt":
		if isDecrypt {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		engine.ServeHTTP(w, r)
	case "other plaintext":
		rec := httptest.NewRecorder()
		engine.ServeHTTP(rec, r)
		answer := rec.Body.Bytes()
		if isDecrypt {
			other := bytes.ToUpper(plain)
			answer = bytes.ReplaceAll(answer, []byte(base64.StdEncoding.EncodeToString(plain)), []byte(base64.StdEncoding.EncodeToString(other)))
		}
		for k, v := range rec.Header() {
			w.Header()[k] = v
		}
		_, _ = w.Write(answer)
	default:
		if n, err := fmt.Sscan(fault, &status); n == 1 && err == nil {
			w.WriteHeader(status)
			_, _ = w.Write([]byte(quote))
			return
		}
		engine.ServeHTTP(w, r)
	}
}

// elsewhere is a host that nothing is to be sent to.
func elsewhere(t *testing.T) (url string, asked *atomic.Bool) {
	asked = new(atomic.Bool)
	server := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Store(true) }))
	t.Cleanup(server.Close)
	return server.URL, asked
}

func vaultPlace(t *testing.T) place {
	v := kektest.NewVault(t)
	url, asked := elsewhere(t)
	open := func(ctx context.Context, key string) (seal.KEK, error) { return kek.Open(ctx, v.URI(key), false) }
	return place{
		open:   func(t *testing.T, key string) (seal.KEK, error) { return open(t.Context(), key) },
		opened: func(t *testing.T, ctx context.Context, key string) seal.KEK { return must(open(ctx, key))(t) },
		remote: &remote{
			secrets: []string{kektest.Token},
			fault: func(fault string) {
				v.Around(func(w http.ResponseWriter, r *http.Request, engine http.Handler) {
					httpFault(fault, url, w, r, engine, strings.Contains(r.URL.Path, "/decrypt/"))
				})
			},
			stop:  v.Close,
			asked: func() (int, bool) { return v.Calls(), asked.Load() },
		},
	}
}

func TestCheck(t *testing.T) {
	for _, uri := range []string{
		"file:///var/lib/workspaced/workspaced.key", "env://KEK", "credential://workspaced.key",
		"hcvault://vault.example.org:8200/transit/keys/workspaced", "hcvault://[::1]:8200/a/b/keys/k", "hcvault://vault/transit/keys/k",
		"aws-kms://arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab", "aws-kms://arn:aws-us-gov:kms:us-gov-west-1:111122223333:alias/a/b",
		"gcp-kms://projects/p-1/locations/global/keyRings/r/cryptoKeys/k", "gcp-kms://projects/example.org:p/locations/europe-west3/keyRings/r/cryptoKeys/k",
	} {
		if err := kek.Check(uri); err != nil {
			t.Errorf("%s: %v", uri, err)
		}
	}
	keyset := newKeyset(t)
	for _, uri := range []string{
		"", "/path", "file:/path", "file://path", "file:///", "ftp://x", "env://", "env://A-B", "env://1", "env://A=B",
		"credential://", "credential://..", "credential://.", "credential://a/b", "credential:///a",
		"hcvault://transit/keys", "hcvault://h/keys/k", "hcvault://h/transit/k", "hcvault:///transit/keys/k", "hcvault://h/../keys/k", "hcvault://h/transit/keys/..",
		"hcvault://h:1/transit/keys/k?token=t0ken", "hcvault://user:t0ken@h:1/transit/keys/k", "hcvault://h:1/transit/keys/k#t0ken", "hcvault://h:1", "hcvault://[::1]:8200",
		"aws-kms://key", "aws-kms://arn:aws:s3:eu-central-1:1:key/k", "aws-kms://arn:aws:kms:eu-central-1:1:key/", "aws-kms://arn:aws:kms::1:key/k",
		"gcp-kms://projects/p", "gcp-kms://projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1",
		keyset, "env://" + keyset, "t0ken",
	} {
		err := kek.Check(uri)
		if err == nil {
			t.Errorf("%s is taken", uri)
			continue
		}
		if s := err.Error(); strings.Contains(s, "t0ken") || strings.Contains(s, "primaryKeyId") {
			t.Errorf("it quotes what may be a secret: %s", s)
		}
		if _, err := kek.Open(t.Context(), uri, true); err == nil {
			t.Errorf("%s is opened", uri)
		}
	}
}

func TestOpen_Refuses(t *testing.T) {
	dir := t.TempDir()
	keyset := newKeyset(t)
	secret := keyset[len(keyset)/3 : len(keyset)/3*2]
	writeFile(t, filepath.Join(dir, "readable"), keyset, 0o644)
	writeFile(t, filepath.Join(dir, "broken"), secret, 0o600)
	writeFile(t, filepath.Join(dir, "ca"), "no certificate", 0o600)
	if err := os.Mkdir(filepath.Join(dir, "directory"), 0o700); err != nil {
		t.Fatal(err)
	}
	credentials := map[string]string{"CREDENTIALS_DIRECTORY": dir}
	for name, c := range map[string]struct {
		uri  string
		env  map[string]string
		want string
		not  bool // there: the error is fs.ErrNotExist
	}{
		"no file":              {uri: "file://" + dir + "/none", want: dir + "/none", not: true},
		"others read the file": {uri: "file://" + dir + "/readable", want: "chmod 600"},
		"file is broken":       {uri: "file://" + dir + "/broken", want: "holds no keyset"},
		"no variable":          {uri: "env://KEK_NONE", want: "environment variable KEK_NONE is not set", not: true},
		"variable is broken":   {uri: "env://KEK_BROKEN", env: map[string]string{"KEK_BROKEN": secret}, want: "environment variable KEK_BROKEN holds no keyset"},
		"no credentials":       {uri: "credential://one", want: "LoadCredential", not: true},
		"no credential":        {uri: "credential://none", env: credentials, want: "credential none can't be opened", not: true},
		"others read it":       {uri: "credential://readable", env: credentials, want: "credential readable has mode 0644"},
		"credential is broken": {uri: "credential://broken", env: credentials, want: "credential broken holds no keyset"},
		"directory":            {uri: "credential://directory", env: credentials, want: "credential directory is not a regular file"},
		"no token":             {uri: "hcvault://h/transit/keys/k", want: "VAULT_TOKEN_FILE"},
		"token is broken":      {uri: "hcvault://h/transit/keys/k", env: map[string]string{"VAULT_TOKEN": secret + "\n" + secret}, want: "VAULT_TOKEN holds no token"},
		"no authorities":       {uri: "hcvault://h/transit/keys/k", env: map[string]string{"VAULT_TOKEN": "x", "VAULT_CACERT": dir + "/none"}, want: "VAULT_CACERT", not: true},
		"bad authorities":      {uri: "hcvault://h/transit/keys/k", env: map[string]string{"VAULT_TOKEN": "x", "VAULT_CACERT": dir + "/ca"}, want: "VAULT_CACERT: there is no certificate"},
		"bad Google file":      {uri: "gcp-kms://projects/p/locations/l/keyRings/r/cryptoKeys/k", env: map[string]string{"GOOGLE_APPLICATION_CREDENTIALS": dir + "/broken"}, want: "GOOGLE_APPLICATION_CREDENTIALS"},
		"bad AWS file":         {uri: awsURI("one"), env: map[string]string{"AWS_PROFILE": "none", "AWS_CONFIG_FILE": dir + "/broken", "AWS_SHARED_CREDENTIALS_FILE": dir + "/broken"}, want: "configuration for AWS"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, name := range []string{"VAULT_TOKEN", "VAULT_TOKEN_FILE", "VAULT_CACERT", "CREDENTIALS_DIRECTORY"} {
				t.Setenv(name, "")
			}
			for name, value := range c.env {
				t.Setenv(name, value)
			}
			key, err := kek.Open(t.Context(), c.uri, false)
			if err == nil || key != nil || !strings.Contains(err.Error(), c.want) || errors.Is(err, fs.ErrNotExist) != c.not {
				t.Fatalf("got %v, %v", key, err)
			}
			if strings.Contains(err.Error(), secret) {
				t.Errorf("it quotes the key: %v", err)
			}
		})
	}
}

// A token file may be written later than the daemon starts, and anew while it runs.
func TestVault_TokenFile(t *testing.T) {
	for name, variable := range map[string]string{"token": "VAULT_TOKEN_FILE", "vault-token": "CREDENTIALS_DIRECTORY"} {
		t.Run(variable, func(t *testing.T) {
			v := kektest.NewVault(t)
			dir := t.TempDir()
			file := filepath.Join(dir, name)
			t.Setenv("VAULT_TOKEN", "")
			if variable == "VAULT_TOKEN_FILE" {
				t.Setenv(variable, file)
			} else {
				t.Setenv(variable, dir)
			}
			key := must(kek.Open(t.Context(), v.URI("one"), false))(t)
			for _, step := range []struct {
				token string
				mode  fs.FileMode
				want  error
			}{
				{"", 0, kek.ErrUnavailable},
				{kektest.Token + "\n", 0o604, kek.ErrRefused},
				{"hvs.expired", 0o640, kek.ErrDenied},
				{"\n", 0o640, kek.ErrRefused},
				{kektest.Token + "\n", 0o640, nil},
			} {
				if step.mode != 0 {
					writeFile(t, file, step.token, step.mode)
				}
				if _, err := key.EncryptWithContext(t.Context(), plain, nil); !errors.Is(err, step.want) {
					t.Errorf("with %q, %v: got %v, want %v", step.token, step.mode, err, step.want)
				}
			}
		})
	}
}

// What Vault 1.14.1 answered, when it was asked by hand for each of these.
func TestVault_RecordedAnswers(t *testing.T) {
	b, err := os.ReadFile("testdata/vault.json")
	if err != nil {
		t.Fatal(err)
	}
	var recorded []struct {
		What   string
		Status int
		Errors []string
		Want   string
	}
	if err := json.Unmarshal(b, &recorded); err != nil || len(recorded) == 0 {
		t.Fatalf("%d answers, %v", len(recorded), err)
	}
	errs := map[string]error{"open": seal.ErrOpen, "refused": kek.ErrRefused, "denied": kek.ErrDenied, "no key": kek.ErrNoKey, "unavailable": kek.ErrUnavailable}
	for _, r := range recorded {
		if err := kek.VaultError(r.Status, r.Errors); errs[r.Want] == nil || !errors.Is(err, errs[r.Want]) {
			t.Errorf("%s: got %v, want %s", r.What, err, r.Want)
		}
	}
}

// What another KEK has wrapped is nobody's business: it is not sent.
func TestVault_ForeignIsNotSent(t *testing.T) {
	v := kektest.NewVault(t)
	key := must(kek.Open(t.Context(), v.URI("one"), false))(t)
	if _, err := key.DecryptWithContext(t.Context(), []byte("\x01of another one"), nil); !errors.Is(err, seal.ErrOpen) || v.Calls() != 0 {
		t.Errorf("got %v, asked %d times", err, v.Calls())
	}
}

// Vault's certificate has to be one of VAULT_CACERT, or without that of the system's
// authorities.
func TestVault_Certificate(t *testing.T) {
	v := kektest.NewVault(t)
	other := filepath.Join(t.TempDir(), "ca.pem")
	writeFile(t, other, otherAuthority(t), 0o600)
	for _, file := range []string{"", other} {
		t.Setenv("VAULT_CACERT", file)
		key := must(kek.Open(t.Context(), v.URI("one"), false))(t)
		if _, err := key.EncryptWithContext(t.Context(), plain, nil); !errors.Is(err, kek.ErrUnavailable) || !strings.Contains(err.Error(), "certificate") {
			t.Errorf("VAULT_CACERT=%q: got %v", file, err)
		}
	}
	if n := v.Calls(); n != 0 {
		t.Errorf("%d requests came through", n)
	}
}

func otherAuthority(t *testing.T) string {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der := must(x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key))(t)
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// What is started later sees none of the secrets; the KEKs still have them.
func TestClearEnv(t *testing.T) {
	v := kektest.NewVault(t)
	aws := awsPlace(t)
	keyset := newKeyset(t)
	t.Setenv("KEK_CLEARED", keyset)
	t.Setenv("KEK_KEPT", "something else")
	uris := []string{"env://KEK_CLEARED", v.URI("one"), awsURI("one"), "file:///x", "no URI"}
	var keys []seal.KEK
	for _, uri := range uris[:2] {
		keys = append(keys, must(kek.Open(t.Context(), uri, false))(t))
	}
	keys = append(keys, must(aws.open(t, "one"))(t))
	if err := kek.ClearEnv(uris...); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "/bin/sh", "-c", "env; tr '\\0' '\\n' </proc/self/environ").Output()
	if err != nil || !bytes.Contains(out, []byte("KEK_KEPT=something else")) {
		t.Fatalf("got %q, %v", out, err)
	}
	for _, secret := range []string{keyset[10:40], kektest.Token, awsSecret, awsSession} {
		if bytes.Contains(out, []byte(secret)) {
			t.Errorf("%q is there", secret)
		}
	}
	for _, key := range keys {
		if _, err := key.EncryptWithContext(t.Context(), plain, nil); err != nil {
			t.Errorf("%s: %v", key.Name(), err)
		}
	}
}

func writeFile(t *testing.T, path, text string, mode fs.FileMode) {
	t.Helper()
	_ = os.Remove(path)
	if err := errors.Join(os.WriteFile(path, []byte(text), mode), os.Chmod(path, mode)); err != nil {
		t.Fatal(err)
	}
}

func must[T any](v T, err error) func(t *testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}
