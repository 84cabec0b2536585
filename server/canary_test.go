package server_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/store/seal/canary"
)

// TestContract17_NoSecretComesBack: no response to an operator or caller, no error or
// log line holds a secret's value, whether the call is good or bad. Who may have
// values: TestContract17_OnlyTheContainerGetsValues.
func TestContract17_NoSecretComesBack(t *testing.T) {
	canaries, n := canary.New(), 0
	value := func() string {
		n++
		return canaries.Value(fmt.Sprint("secret ", n))
	}
	run(t, func(t *testing.T, h *harness) {
		var seen strings.Builder
		note := func(m proto.Message, err error) {
			if err != nil {
				seen.WriteString(err.Error())
				m = status.Convert(err).Proto()
				seen.WriteString(fmt.Sprint(status.Convert(err).Details()))
			}
			seen.WriteString(protojson.Format(m))
			seen.WriteString(fmt.Sprintf("%v", m))
		}
		ctx, c := h.ctx(), h.Client
		const name = "workspaces/w"
		valid := text("A", value())
		good := func(extra ...*secret) []*secret { return append([]*secret{valid, text("B", value())}, extra...) }

		// Good calls.
		note(c.CreateWorkspace(ctx, &createReq{WorkspaceId: "w", Workspace: &ws{Spec: spec()}, Secrets: good(), RequestId: "r1"}))
		note(c.CreateWorkspace(ctx, &createReq{Workspace: &ws{Spec: spec()}, Secrets: good(), ValidateOnly: true}))
		note(c.SetSecret(ctx, &workspacev1.SetSecretRequest{Name: name + "/secrets/C", Payload: &workspacev1.SetSecretRequest_Text{Text: value()}, RequestId: "r2"}))
		note(c.SetSecret(ctx, &workspacev1.SetSecretRequest{Name: "secrets/G", Payload: &workspacev1.SetSecretRequest_Data{Data: []byte(value())}}))
		note(c.BatchUpdateSecrets(ctx, &workspacev1.BatchUpdateSecretsRequest{Parent: name, Secrets: good(), DeleteKeys: []string{"C"}}))
		note(c.SetSecret(ctx, &workspacev1.SetSecretRequest{
			Name: name + "/secrets/FILE", Payload: &workspacev1.SetSecretRequest_Data{Data: []byte(value() + "\x00")}, Delivery: workspacev1.SecretDelivery_SECRET_DELIVERY_FILES,
		}))
		for _, secret := range []string{name + "/secrets/V", "secrets/V"} {
			for range 4 {
				note(c.SetSecret(ctx, &workspacev1.SetSecretRequest{Name: secret, Payload: &workspacev1.SetSecretRequest_Text{Text: value()}}))
			}
			note(c.RollBackSecret(ctx, &workspacev1.RollBackSecretRequest{Name: secret, Version: 1, RequestId: "r3" + secret}))
			note(c.DisableSecretVersion(ctx, &workspacev1.DisableSecretVersionRequest{Name: secret + "/versions/2"}))
			note(c.EnableSecretVersion(ctx, &workspacev1.EnableSecretVersionRequest{Name: secret + "/versions/2"}))
			note(c.DisableSecretVersion(ctx, &workspacev1.DisableSecretVersionRequest{Name: secret + "/versions/2"}))
			note(c.DestroySecretVersion(ctx, &workspacev1.DestroySecretVersionRequest{Name: secret + "/versions/3"}))
			for version := range int64(9) { // some of which can't be
				note(c.RollBackSecret(ctx, &workspacev1.RollBackSecretRequest{Name: secret, Version: version, ValidateOnly: true}))
				note(c.DestroySecretVersion(ctx, &workspacev1.DestroySecretVersionRequest{Name: fmt.Sprint(secret, "/versions/", version), ValidateOnly: true}))
			}
			note(c.ListSecretVersions(ctx, &workspacev1.ListSecretVersionsRequest{Parent: secret}))
		}
		synctest.Wait()
		note(c.GetSecret(ctx, &workspacev1.GetSecretRequest{Name: name + "/secrets/A"}))
		note(c.ListSecrets(ctx, &workspacev1.ListSecretsRequest{Parent: name}))
		note(c.ListSecrets(ctx, &workspacev1.ListSecretsRequest{Parent: "global"}))
		note(c.GetWorkspace(ctx, &workspacev1.GetWorkspaceRequest{Name: name}))
		note(c.ListWorkspaces(ctx, &workspacev1.ListWorkspacesRequest{}))
		note(c.WaitWorkspace(ctx, &workspacev1.WaitWorkspaceRequest{Name: name}))
		stream := must2(c.WatchWorkspaces(ctx, &workspacev1.WatchWorkspacesRequest{}))(t)
		for _, resp := range recvUntil(t, stream, isSynced) {
			note(resp, nil)
		}

		// Bad calls, each with secrets: too large, with a NUL, twice, reserved, the
		// model's, over the quota, reused request ids, wrong names, wrong etags.
		long := func() string { return value() + strings.Repeat("x", 64<<10) }
		nul := func() *secret {
			return &secret{Key: "N", Payload: &workspacev1.SecretValue_Data{Data: []byte(value() + "\x00")}}
		}
		for _, secrets := range [][]*secret{
			good(text("L", long())), good(nul()), good(valid), good(text("WORKSPACE_X", value())),
			good(text("MODEL_PROVIDER", value())), good(text("BAD-KEY", value())), good(&secret{Key: "E"}), append(good(), manySecrets(17)...),
		} {
			note(c.CreateWorkspace(ctx, &createReq{WorkspaceId: "w2", Workspace: &ws{Spec: spec()}, Secrets: secrets}))
			note(c.CreateWorkspace(ctx, &createReq{WorkspaceId: "w", Workspace: &ws{Spec: spec()}, Secrets: secrets, RequestId: "r1"}))
			note(c.BatchUpdateSecrets(ctx, &workspacev1.BatchUpdateSecretsRequest{Parent: name, Secrets: secrets}))
			note(c.BatchUpdateSecrets(ctx, &workspacev1.BatchUpdateSecretsRequest{Parent: "workspaces/none", Secrets: secrets}))
		}
		for _, n := range []string{"", "x", name + "/secrets/1", name + "/secrets/MODEL_PROVIDER", "secrets/WORKSPACE_A", "workspaces/none/secrets/A", name + "/secrets/A"} {
			for _, v := range []string{value(), long(), value() + "\x00"} {
				note(c.SetSecret(ctx, &workspacev1.SetSecretRequest{Name: n, Payload: &workspacev1.SetSecretRequest_Text{Text: v}, Etag: `"v99"`}))
				note(c.SetSecret(ctx, &workspacev1.SetSecretRequest{Name: n, Payload: &workspacev1.SetSecretRequest_Data{Data: []byte(v)}, RequestId: "r2"}))
				note(c.SetSecret(ctx, &workspacev1.SetSecretRequest{Name: n, Payload: &workspacev1.SetSecretRequest_Text{Text: v}, Apply: 77}))
			}
		}
		gone, cancel := context.WithCancel(ctx)
		cancel()
		note(c.SetSecret(gone, &workspacev1.SetSecretRequest{Name: "secrets/A", Payload: &workspacev1.SetSecretRequest_Text{Text: value()}}))
		h.Drain()
		note(c.SetSecret(ctx, &workspacev1.SetSecretRequest{Name: "secrets/A", Payload: &workspacev1.SetSecretRequest_Text{Text: value()}}))
		if err := h.Restart(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()

		// The canaries did reach the container, so they were not lost on the way.
		if env := strings.Join(h.env("w"), "\n"); canaries.Find([]byte(env)) == nil {
			t.Errorf("no canary in %q", env)
		}
		for where, what := range map[string]string{"what callers got": seen.String(), "the log": h.log.String()} {
			if len(what) < 1000 {
				t.Errorf("%s is too short to be true: %q", where, what)
			}
			for _, hit := range canaries.Find([]byte(what)) {
				t.Errorf("%s holds a secret: %s", where, hit)
			}
		}
	})
}
