package kek_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/workspaced/workspaced/store/seal"
	"github.com/workspaced/workspaced/store/seal/kek"
)

const (
	awsSecret  = "wJalrXUtnFEMI/K7MDENG/test"
	awsSession = "session-0123456789abcdef"
)

func awsURI(key string) string { return "aws-kms://arn:aws:kms:eu-central-1:111122223333:key/" + key }

// awsKMS speaks the part of AWS KMS's JSON protocol that is needed, for the keys
// one and two.
type awsKMS struct{ keys map[string]*seal.Local }

func (k *awsKMS) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/x-amz-json-1.1")
	fail := func(status int, code string) {
		w.WriteHeader(status)
		_, _ = fmt.Fprintf(w, `{"__type": %q, "message": "no"}`, code)
	}
	authorization := r.Header.Get("Authorization")
	if !strings.HasPrefix(authorization, "AWS4-HMAC-SHA256 Credential=AKID/") || !strings.Contains(authorization, "/eu-central-1/kms/aws4_request") || r.Header.Get("X-Amz-Security-Token") != awsSession {
		fail(http.StatusBadRequest, "UnrecognizedClientException")
		return
	}
	var ask struct {
		KeyId                     string
		Plaintext, CiphertextBlob []byte
		EncryptionContext         map[string]string
	}
	if err := json.NewDecoder(r.Body).Decode(&ask); err != nil {
		fail(http.StatusBadRequest, "SerializationException")
		return
	}
	name := ask.KeyId[strings.LastIndex(ask.KeyId, "/")+1:]
	key := k.keys[name]
	if key == nil {
		fail(http.StatusBadRequest, "NotFoundException")
		return
	}
	bound, _ := json.Marshal(ask.EncryptionContext) // sorted
	switch target := r.Header.Get("X-Amz-Target"); target {
	case "TrentService.Encrypt":
		sealed, err := key.EncryptWithContext(r.Context(), ask.Plaintext, bound)
		if err != nil || len(ask.Plaintext) > 4096 {
			fail(http.StatusBadRequest, "ValidationException")
			return
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"CiphertextBlob": sealed, "KeyId": ask.KeyId})
	case "TrentService.Decrypt":
		plain, err := key.DecryptWithContext(r.Context(), ask.CiphertextBlob, bound)
		if err != nil {
			for _, other := range k.keys { // it tells which key it was
				if _, err := other.DecryptWithContext(r.Context(), ask.CiphertextBlob, bound); err == nil {
					fail(http.StatusBadRequest, "IncorrectKeyException")
					return
				}
			}
			fail(http.StatusBadRequest, "InvalidCiphertextException")
			return
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"Plaintext": plain, "KeyId": ask.KeyId})
	default:
		fail(http.StatusBadRequest, "UnknownOperationException")
	}
}

func awsPlace(t *testing.T) place {
	engine := &awsKMS{map[string]*seal.Local{}}
	for _, name := range []string{"one", "two"} {
		engine.keys[name] = must(seal.Parse(name, []byte(newKeyset(t))))(t)
	}
	var (
		mu    sync.Mutex
		fault string
		calls atomic.Int64
	)
	url, asked := elsewhere(t)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		calls.Add(1)
		mu.Lock()
		f := fault
		mu.Unlock()
		httpFault(f, url, w, r, engine, strings.HasSuffix(r.Header.Get("X-Amz-Target"), "Decrypt"))
	}))
	t.Cleanup(server.Close)
	for name, value := range map[string]string{
		"AWS_ENDPOINT_URL_KMS": server.URL, "AWS_ACCESS_KEY_ID": "AKID", "AWS_SECRET_ACCESS_KEY": awsSecret, "AWS_SESSION_TOKEN": awsSession,
		"AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
	} {
		t.Setenv(name, value)
	}
	open := func(ctx context.Context, key string) (seal.KEK, error) { return kek.Open(ctx, awsURI(key), false) }
	return place{
		open:   func(t *testing.T, key string) (seal.KEK, error) { return open(t.Context(), key) },
		opened: func(t *testing.T, ctx context.Context, key string) seal.KEK { return must(open(ctx, key))(t) },
		remote: &remote{
			secrets: []string{awsSecret, awsSession},
			fault:   func(f string) { mu.Lock(); defer mu.Unlock(); fault = f },
			stop:    server.Close,
			asked:   func() (int, bool) { return int(calls.Load()), asked.Load() },
		},
	}
}

// Without credentials nothing is asked, and it is no verdict: the machine's own may
// be there later.
func TestAWS_NoCredentials(t *testing.T) {
	p := awsPlace(t)
	for _, name := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"} {
		t.Setenv(name, "")
	}
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	key := must(p.open(t, "one"))(t)
	_, err := key.EncryptWithContext(t.Context(), plain, nil)
	if n, _ := p.remote.asked(); n != 0 || !errors.Is(err, kek.ErrUnavailable) || !strings.Contains(err.Error(), "credentials") {
		t.Errorf("asked %d times, got %v", n, err)
	}
}
