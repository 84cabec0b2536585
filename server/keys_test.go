package server_test

import (
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server"
	"github.com/workspaced/workspaced/server/access"
)

func (h *harness) dataKeys() *workspacev1.DataKeys {
	h.t.Helper()
	return must2(h.Admin.GetServerInfo(h.ctx(), &workspacev1.GetServerInfoRequest{}))(h.t).GetDataKeys()
}

func TestRotateKey(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("a", func(r *createReq) { r.Secrets = []*secret{text("KEY", "v")} })
		before := h.dataKeys()
		if keys := before.GetKeys(); len(keys) != 1 || !keys[0].GetPrimary() || keys[0].GetRecords() != 0 || before.GetRotateTime() != nil ||
			before.GetState() != workspacev1.DataKeysState_DATA_KEYS_STATE_SETTLED || before.GetWrappedBy() == "" {
			t.Errorf("got %v", before)
		}
		rehearsed := must2(h.Admin.RotateKey(h.ctx(), &workspacev1.RotateKeyRequest{ValidateOnly: true}))(t)
		if got := h.dataKeys(); got.GetKeys()[0].GetKeyId() != before.GetKeys()[0].GetKeyId() || rehearsed.GetKeyId() == 0 {
			t.Errorf("a rehearsal: %v, keys %v", rehearsed, got)
		}
		req := &workspacev1.RotateKeyRequest{RequestId: "rotate"}
		r := must2(h.Admin.RotateKey(h.ctx(), req))(t)
		if again := must2(h.Admin.RotateKey(h.ctx(), req))(t); again.GetKeyId() != r.GetKeyId() {
			t.Errorf("the same request: %v, %v", r, again)
		}
		if err := h.Restart(); err != nil {
			t.Fatal(err)
		}
		after := h.dataKeys()
		for after.GetState() != workspacev1.DataKeysState_DATA_KEYS_STATE_SETTLED {
			advance(time.Second)
			after = h.dataKeys()
		}
		if keys := after.GetKeys(); len(keys) != 1 || keys[0].GetKeyId() != r.GetKeyId() || r.GetKeyId() == before.GetKeys()[0].GetKeyId() || after.GetRotateTime() == nil {
			t.Errorf("got %v, rotated to %v", after, r)
		}
		_, err := h.Admin.RotateKey(h.ctx(), &workspacev1.RotateKeyRequest{RequestId: "two words"})
		wantCode(t, err, codes.InvalidArgument, server.ReasonInvalidFields)

		viewer := must2(h.As(access.Subject{Name: "v", Grants: []access.Grant{{Roles: access.RolesOf(workspacev1.Role_ROLE_VIEWER)}}}))(t)
		info := must2(workspacev1.NewAdminControlClient(viewer.Conn).GetServerInfo(h.ctx(), &workspacev1.GetServerInfoRequest{}))(t)
		if info.GetDataKeys() != nil {
			t.Errorf("a viewer gets %v", info)
		}
	})
}
