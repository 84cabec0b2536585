package kek

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/workspaced/workspaced/store/seal"
)

const (
	envVaultToken     = "VAULT_TOKEN"
	envVaultTokenFile = "VAULT_TOKEN_FILE"
	envVaultCACert    = "VAULT_CACERT"
	envVaultNamespace = "VAULT_NAMESPACE"
	credentialVault   = "vault-token"

	maxAnswerBytes = 1 << 20
	// vaultPrefix begins all that a transit engine has encrypted.
	vaultPrefix = "vault:v"
)

// vault asks the transit engine of Vault or OpenBao: one POST each to
// /v1/MOUNT/encrypt/KEY and /v1/MOUNT/decrypt/KEY.
type vault struct {
	client     *http.Client
	address    string // https://host:port
	mount, key string
	namespace  string
	token      func() (string, error)
}

func openVault(ctx context.Context, s source, _ bool) (seal.KEK, error) {
	host, place, _ := strings.Cut(s.rest, "/")
	keys, key := path.Split(place)
	v := &vault{
		address: "https://" + host, mount: strings.TrimSuffix(keys, "/keys/"), key: key,
		namespace: os.Getenv(envVaultNamespace),
	}
	var err error
	if v.token, err = vaultToken(); err != nil {
		return nil, err
	}
	transport := &http.Transport{
		Proxy:             http.ProxyFromEnvironment,
		TLSClientConfig:   &tls.Config{MinVersion: tls.VersionTLS12},
		ForceAttemptHTTP2: true,
		DisableKeepAlives: true, // it is asked once a month
	}
	if file := os.Getenv(envVaultCACert); file != "" {
		pem, err := os.ReadFile(filepath.Clean(file))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", envVaultCACert, err)
		}
		transport.TLSClientConfig.RootCAs = x509.NewCertPool()
		if !transport.TLSClientConfig.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s: there is no certificate in %s", envVaultCACert, file)
		}
	}
	v.client = &http.Client{Transport: transport, CheckRedirect: refuseRedirect}
	return newService(ctx, "Vault key "+s.uri, v), nil
}

// vaultToken returns what gets the token: from the environment now, as it will not
// be there any more, or from a file each time.
func vaultToken() (func() (string, error), error) {
	if token := os.Getenv(envVaultToken); token != "" {
		token, err := checkToken(envVaultToken, []byte(token))
		return func() (string, error) { return token, nil }, err
	}
	what, file := "the token file that "+envVaultTokenFile+" names", os.Getenv(envVaultTokenFile)
	if dir := credentialsDirectory(); file == "" && dir != "" {
		what, file = "the credential "+credentialVault, filepath.Join(dir, credentialVault)
	}
	if file == "" {
		return nil, fmt.Errorf("there is no token for Vault: set %s or %s, or give the credential %s", envVaultTokenFile, envVaultToken, credentialVault)
	}
	return func() (string, error) {
		b, err := readPrivate(what, file)
		switch {
		case errors.Is(err, fs.ErrNotExist): // its agent starts later, maybe
			return "", fail(ErrUnavailable, "%v", err)
		case err != nil:
			return "", fail(ErrRefused, "%v", err)
		}
		return checkToken(what, b)
	}, nil
}

// checkToken keeps out what HTTP would complain of, and that by quoting it.
func checkToken(what string, b []byte) (string, error) {
	token := strings.TrimSpace(string(b))
	if token == "" || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fail(ErrRefused, "%s holds no token", what)
	}
	return token, nil
}

// vaultData is what a transit engine is asked with and answers.
type vaultData struct {
	Plaintext  []byte `json:"plaintext,omitempty"`
	Ciphertext string `json:"ciphertext,omitempty"`
	Associated []byte `json:"associated_data,omitempty"`
}

func (v *vault) encrypt(ctx context.Context, plain, associated []byte) ([]byte, error) {
	data, err := v.post(ctx, "encrypt", vaultData{Plaintext: plain, Associated: associated})
	if err == nil && !strings.HasPrefix(data.Ciphertext, vaultPrefix) {
		err = errGarbage
	}
	return []byte(data.Ciphertext), err
}

func (v *vault) decrypt(ctx context.Context, wrapped, associated []byte) ([]byte, error) {
	if !bytes.HasPrefix(wrapped, []byte(vaultPrefix)) { // another KEK's
		return nil, seal.ErrOpen
	}
	data, err := v.post(ctx, "decrypt", vaultData{Ciphertext: string(wrapped), Associated: associated})
	return data.Plaintext, err
}

func (v *vault) post(ctx context.Context, verb string, ask vaultData) (vaultData, error) {
	token, err := v.token()
	if err != nil {
		return vaultData{}, err
	}
	body, err := json.Marshal(ask)
	if err != nil {
		return vaultData{}, err
	}
	place := path.Join(v.mount, verb, v.key)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, v.address+"/v1/"+place, bytes.NewReader(body))
	if err != nil {
		return vaultData{}, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-Vault-Token", token)
	req.Header.Set("X-Vault-Request", "true")
	if v.namespace != "" {
		req.Header.Set("X-Vault-Namespace", v.namespace)
	}
	resp, err := v.client.Do(req)
	if err != nil {
		return vaultData{}, noAnswer(err)
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswerBytes))
	if err != nil {
		return vaultData{}, noAnswer(err)
	}
	var got struct {
		Data   *vaultData
		Errors []string
	}
	understood := json.Unmarshal(answer, &got) == nil
	switch {
	case resp.StatusCode != http.StatusOK:
		return vaultData{}, vaultError(resp.StatusCode, place, got.Errors)
	case !understood || got.Data == nil:
		return vaultData{}, errGarbage
	}
	return *got.Data, nil
}

// vaultError says what a status means. The texts tell apart what has the same one.
func vaultError(status int, place string, texts []string) error {
	says := func(part string) bool {
		return slices.ContainsFunc(texts, func(text string) bool { return strings.Contains(text, part) })
	}
	switch {
	case isRedirect(status):
		return redirected(status)
	case status == http.StatusBadRequest && (says("message authentication failed") || says("invalid ciphertext")):
		return seal.ErrOpen
	case status == http.StatusBadRequest && says("encryption key not found"):
		return fail(ErrNoKey, "there is no such key (HTTP 400)")
	case status == http.StatusBadRequest && says("too old"):
		return fail(ErrRefused, "its min_decryption_version excludes the version that the data keys are wrapped with (HTTP 400)")
	case status == http.StatusUnauthorized, status == http.StatusForbidden, status == http.StatusBadRequest && says("missing client token"):
		return fail(ErrDenied, "permission denied (HTTP %d): the token is not valid any more, or its policy has no update on %s, or there is no such key", status, place)
	case status == http.StatusNotFound:
		return fail(ErrNoKey, "there is no transit engine for %s (HTTP 404)", place)
	case status == http.StatusServiceUnavailable:
		return fail(ErrUnavailable, "it is sealed, or not ready (HTTP 503)")
	case status >= 500, status == http.StatusTooManyRequests, status == http.StatusPreconditionFailed:
		return fail(ErrUnavailable, "it fails (HTTP %d)", status)
	}
	return fail(ErrRefused, "it refuses %s (HTTP %d)", place, status)
}
