package server_test

import (
	"testing"
	"time"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

func TestGetServerInfo(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		info := func() *workspacev1.GetServerInfoResponse {
			return must2(h.Admin.GetServerInfo(h.ctx(), &workspacev1.GetServerInfoRequest{}))(t)
		}
		before := info()
		if before.GetVersion() != "test" || before.GetDatabaseUid() == "" || !before.GetStartTime().AsTime().Equal(time.Now()) || before.GetCaller().GetSubject() != "test" {
			t.Errorf("got %v", before)
		}
		advance(time.Hour)
		if err := h.Restart(); err != nil {
			t.Fatal(err)
		}
		after := info()
		if after.GetDatabaseUid() != before.GetDatabaseUid() || after.GetStartTime().AsTime().Sub(before.GetStartTime().AsTime()) < time.Hour {
			t.Errorf("after a restart: got %v, before %v", after, before)
		}
	})
}
