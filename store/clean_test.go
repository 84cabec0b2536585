package store

import (
	"reflect"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// fillValue gives every field below v something, times in a local zone.
func fillValue(v reflect.Value) {
	switch {
	case v.Type() == reflect.TypeFor[time.Time]():
		v.Set(reflect.ValueOf(time.Date(2026, 1, 2, 3, 4, 5, 6, time.FixedZone("local", 3600))))
	case v.Kind() == reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fillValue(v.Elem())
	case v.Kind() == reflect.Struct:
		for i := range v.NumField() {
			fillValue(v.Field(i))
		}
	case v.Kind() == reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fillValue(v.Index(0))
	case v.Kind() == reflect.Map:
		key, elem := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
		fillValue(key)
		fillValue(elem)
		v.Set(reflect.MakeMap(v.Type()))
		v.SetMapIndex(key, elem)
	case v.Kind() == reflect.String:
		v.SetString("x")
	case v.CanInt():
		v.SetInt(7)
	case v.Kind() == reflect.Bool:
		v.SetBool(true)
	}
}

// Every field of a spec is copied, whatever is added to it.
func TestCleanSpec_CopiesAll(t *testing.T) {
	var s Spec
	fillValue(reflect.ValueOf(&s).Elem())
	c := cleanSpec(s)
	if diff := cmp.Diff(s, c); diff != "" {
		t.Error(diff)
	}
	a, b := reflect.ValueOf(s), reflect.ValueOf(c)
	for i := range a.NumField() {
		switch a.Field(i).Kind() {
		case reflect.Pointer, reflect.Slice, reflect.Map:
			if a.Field(i).Pointer() == b.Field(i).Pointer() {
				t.Errorf("%s is shared", a.Type().Field(i).Name)
			}
		}
	}

	// Empty is nil.
	empty := reflect.ValueOf(&s).Elem()
	for i := range empty.NumField() {
		switch f := empty.Field(i); f.Kind() {
		case reflect.Slice:
			f.Set(reflect.MakeSlice(f.Type(), 0, 0))
		case reflect.Map:
			f.Set(reflect.MakeMap(f.Type()))
		default:
			f.SetZero()
		}
	}
	if diff := cmp.Diff(Spec{}, cleanSpec(s)); diff != "" {
		t.Error(diff)
	}
}

// Every time in a status is stored in UTC, whatever is added to it.
func TestUTCStatus_AllTimes(t *testing.T) {
	var st Status
	fillValue(reflect.ValueOf(&st).Elem())
	var check func(path string, v reflect.Value)
	check = func(path string, v reflect.Value) {
		switch {
		case v.Type() == reflect.TypeFor[time.Time]():
			if at := v.Interface().(time.Time); at.Location() != time.UTC || at.Hour() != 2 {
				t.Errorf("%s is %v", path, at)
			}
		case v.Kind() == reflect.Pointer:
			check(path, v.Elem())
		case v.Kind() == reflect.Struct:
			for i := range v.NumField() {
				check(path+"."+v.Type().Field(i).Name, v.Field(i))
			}
		}
	}
	check("Status", reflect.ValueOf(utcStatus(st)))
}
