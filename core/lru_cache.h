// A map of bounded size that forgets what was not used for longest.
#pragma once

#include <cstddef>
#include <list>
#include <map>
#include <utility>

namespace bitfall {

template <typename Key, typename Value>
class LruCache {
 public:
  explicit LruCache(std::size_t capacity) : capacity_(capacity) {}

  /// The value of `key`, made by `create()` if it is not held. Valid until it is evicted: at least
  /// for the next `capacity - 1` calls.
  template <typename Create>
  Value& get(const Key& key, const Create& create) {
    const auto found = index_.find(key);
    if (found != index_.end()) {
      entries_.splice(entries_.begin(), entries_, found->second);
      return found->second->second;
    }
    entries_.emplace_front(key, create());
    index_[key] = entries_.begin();
    if (entries_.size() > capacity_) {
      index_.erase(entries_.back().first);
      entries_.pop_back();
    }
    return entries_.front().second;
  }

  std::size_t size() const { return entries_.size(); }

 private:
  std::size_t capacity_;
  std::list<std::pair<Key, Value>> entries_;  // the last used first
  std::map<Key, typename std::list<std::pair<Key, Value>>::iterator> index_;
};

}  // namespace bitfall
