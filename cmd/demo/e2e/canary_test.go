package e2e

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// Promise 21: no value of a secret is in any file that daemon, containerd and
// shims wrote, nor on a command line, in whatever usual encoding. Debug logs,
// failures and a crash are part of it.
func TestContract21_Canary(t *testing.T) {
	s := newStage(t, 3*time.Minute, "--log-level=debug")
	canaries := map[string]string{
		"CREATED": "canary-created-5a1c", "SET": "canary-set-91fe", "SECOND": "canary-second-77d0",
		"GLOBAL": "canary-global-42bb", "BATCH": "canary-batch-e8a3", "BROKEN": "canary-broken-0c9d", "BAD": "canary-bad-6e21",
	}
	s.create("one", map[string]string{"CREATED": canaries["CREATED"]})
	s.wait("one", s.set("one", "SET", canaries["SET"]))
	s.wait("one", s.set("one", "SET", canaries["SECOND"]))
	if _, err := s.client().SetSecret(s.ctx, &workspacev1.SetSecretRequest{
		Name: "secrets/GLOBAL", Payload: &workspacev1.SetSecretRequest_Text{Text: canaries["GLOBAL"]},
		RequestId: "remembered",
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.client().BatchUpdateSecrets(s.ctx, &workspacev1.BatchUpdateSecretsRequest{
		Parent:    "workspaces/one",
		Secrets:   []*workspacev1.SecretValue{{Key: "BATCH", Payload: &workspacev1.SecretValue_Data{Data: []byte(canaries["BATCH"])}}},
		RequestId: "remembered too",
	}); err == nil {
		t.Error("a request id with a space was accepted")
	}
	if _, err := s.client().BatchUpdateSecrets(s.ctx, &workspacev1.BatchUpdateSecretsRequest{
		Parent:    "workspaces/one",
		Secrets:   []*workspacev1.SecretValue{{Key: "BATCH", Payload: &workspacev1.SecretValue_Data{Data: []byte(canaries["BATCH"])}}},
		RequestId: "remembered-too",
	}); err != nil {
		t.Fatal(err)
	}
	// Refused: must not be in the error or the log either.
	_, err := s.client().SetSecret(s.ctx, setSecret("one", "BAD", canaries["BAD"]+"\x00"))
	if err == nil || strings.Contains(err.Error(), canaries["BAD"]) {
		t.Errorf("a value with a NUL: %v", err)
	}
	w := s.wait("one", 0)
	env := s.inside("one", w.ObservedGeneration)
	for key, value := range map[string]string{"SET": canaries["SECOND"], "GLOBAL": canaries["GLOBAL"], "BATCH": canaries["BATCH"]} {
		if env[key] != value {
			t.Errorf("%s is %q inside: the test proves nothing", key, env[key])
		}
	}
	// A command that fails, and a kill in the middle.
	s.update("one", &workspacev1.WorkspaceSpec{Command: []string{"/version"}}, "spec.command")
	s.set("one", "BROKEN", canaries["BROKEN"])
	s.until("one", "DEGRADED", func(w *workspacev1.Workspace) bool { return w.State == degraded })
	if err := s.Daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	s.start()
	s.wait("one", s.update("one", &workspacev1.WorkspaceSpec{}, "spec.command"))

	var needles [][]byte
	for _, value := range canaries {
		needles = append(needles, []byte(value), []byte(hex.EncodeToString([]byte(value))),
			[]byte(base64.StdEncoding.EncodeToString([]byte(value)))[:len(value)]) // but for its end, which depends on what follows
	}
	files, err := search(s.Daemon.Base, needles)
	if err != nil {
		t.Error(err)
	}
	if files < 20 {
		t.Errorf("only %d files were searched", files)
	}
	for _, pattern := range []string{"/proc/[0-9]*/cmdline", "/proc/[0-9]*/comm"} {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range paths {
			if err := searchFile(path, needles); err != nil && !errors.Is(err, fs.ErrNotExist) && !strings.Contains(err.Error(), "no such process") {
				t.Error(err)
			}
		}
	}
	// The search works: what is no secret is found.
	if _, err := search(s.Daemon.DataDir(), [][]byte{[]byte("ENVSERVER_SOCKET")}); err == nil {
		t.Error("the search does not even find a plain setting")
	}
}

// search looks into every regular file below dir and says which holds a needle.
func search(dir string, needles [][]byte) (files int, err error) {
	var found error
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // removed meanwhile
		}
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		files++
		if err := searchFile(path, needles); err != nil && !errors.Is(err, fs.ErrNotExist) {
			found = errors.Join(found, err)
		}
		return nil
	})
	return files, errors.Join(err, found)
}

func searchFile(path string, needles [][]byte) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	for _, n := range needles {
		if bytes.Contains(data, n) {
			return fmt.Errorf("%s holds %q", path, n)
		}
	}
	return nil
}
